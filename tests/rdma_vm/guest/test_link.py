"""The link between two hosts: what it posts for what, and what it does when rails go."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import anyio
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness import until

import aiocomm
from aiocomm.errors import LinkError
from aiocomm.types import Fallback, LinkDown, LinkUp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio

MIB = 1 << 20
CHUNK = MIB
# An emulated processor may stand still for seconds: neither its engine nor its device is given up for that.
PATIENT = {
    "AIOCOMM_HEARTBEAT_S": "2",
    "AIOCOMM_DRAIN_TIMEOUT_S": "30",
    "AIOCOMM_RDMA_RETRY_S": "4",
}


@pytest.fixture
def anyio_backend() -> str:
    """One loop: what is tested here lies below it, and emulated seconds are dear."""
    return "asyncio"


@contextlib.asynccontextmanager
async def hosts(
    rails: int, *, links: tuple[str, ...] = ("rdma",), **settings: str
) -> AsyncIterator[list[aiocomm.Communicator]]:
    """Rank 0 on host a and rank 1 on host b, connected over so many rails."""
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    members: dict[int, aiocomm.Communicator] = {}

    async def join(rank: int, connecting: Any) -> None:
        members[rank] = await connecting

    async with anyio.create_task_group() as group:
        for rank, host in enumerate("ab"):
            devices = ",".join(f"rxe{host}{rail}" for rail in range(rails))
            with mock.patch.dict(os.environ, PATIENT | settings | {"AIOCOMM_RDMA_DEVICES": devices}):
                opening = aiocomm.connect(address, rank=rank, size=2, links=links, warmup=True)
            group.start_soon(join, rank, opening)
    try:
        yield [members[0], members[1]]
    finally:
        for rank in (1, 0):
            await members[rank].aclose()


def device(comm: aiocomm.Communicator) -> dict[str, int]:
    """What its devices have counted."""
    return dict(comm.links["rdma"].statistics().device)


def grown(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    names = ("sends", "inline_sends", "writes", "reads", "send_completions", "immediates_received")
    return {name: after[name] - before[name] for name in names if after[name] != before[name]}


def random(nbytes: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def down(interface: str) -> None:
    run("ip", "link", "set", interface, "down")


def up(interface: str) -> None:
    """The interface, and the route that went with it; both ends' ports hear of it some time later."""
    run("ip", "link", "set", interface, "up")
    host, rail = interface[0], interface[1]
    table, other = ("10", 2) if host == "a" else ("11", 1)
    run("ip", "route", "replace", f"10.2{rail}.0.{other}", "dev", interface, "table", f"{table}{rail}")
    for port in (f"rxe{end}{rail}" for end in "ab"):
        while "ACTIVE" not in Path(f"/sys/class/infiniband/{port}/ports/1/state").read_text():
            time.sleep(0.01)


async def failed_lane(comm: aiocomm.Communicator) -> None:
    """One lane fails, and no other. What was under way may have been through before its device went."""
    await until(lambda: device(comm)["lanes_failed"])
    assert device(comm)["lanes_failed"] == 1


async def heard(a: aiocomm.Communicator, b: aiocomm.Communicator) -> None:
    """The first has taken in what the second has said: an empty message comes after it."""
    await b.send(b"", 0, tag=99)
    await a.recv(bytearray(), 1, tag=99)


async def test_a_posted_receive_costs_an_inline_send_and_its_writes() -> None:
    async with hosts(1) as (a, b):
        sent, got = random(2 * CHUNK + 5), np.zeros(2 * CHUNK + 5, np.uint8)
        before_a, before_b = device(a), device(b)
        receiving = b.recv(got, 0)
        await until(lambda: device(b)["sends"] > before_b["sends"])
        await heard(a, b)
        await a.send(sent, 1)
        await receiving
        np.testing.assert_array_equal(got, sent)
        assert grown(device(a), before_a) == {"writes": 3, "send_completions": 3}
        assert device(b)["reads"] == 0
        of_b = grown(device(b), before_b)
        of_b.pop("send_completions", None)  # of the offer and the empty message, whenever they are looked for
        assert of_b == {"sends": 2, "inline_sends": 2, "immediates_received": 3}
        assert b.links["rdma"].statistics().messages_by_path["write"] == 1


async def test_a_shorter_message_says_so() -> None:
    async with hosts(1) as (a, b):
        sent, got = random(MIB), np.zeros(2 * MIB, np.uint8)
        before, quiet = device(a), device(b)["sends"]
        receiving = b.recv(got, 0)
        await until(lambda: device(b)["sends"] > quiet)
        await heard(a, b)
        await a.send(sent, 1)
        assert (await receiving).nbytes == MIB
        np.testing.assert_array_equal(got[:MIB], sent)
        assert not got[MIB:].any()
        assert {k: v for k, v in grown(device(a), before).items() if k != "send_completions"} == {
            "sends": 1,
            "inline_sends": 1,
            "writes": 1,
        }


@pytest.mark.parametrize("nbytes", [1, 4096])
async def test_a_small_message_is_one_send(nbytes: int) -> None:
    async with hosts(1) as (a, b):
        got = np.zeros(nbytes, np.uint8)
        before = [device(a), device(b)]
        receiving = b.recv(got, 0)
        await a.send(random(nbytes), 1)
        await receiving
        np.testing.assert_array_equal(got, random(nbytes))
        assert device(a)["sends"] - before[0]["sends"] == 1
        assert device(b)["sends"] == before[1]["sends"]


async def test_a_small_message_wakes_the_loop_alone() -> None:
    async with hosts(1) as (a, b):
        out, back = np.zeros(8, np.uint8), np.zeros(8, np.uint8)

        async def round_trip() -> None:
            there = b.recv(out, 0)
            await a.send(back, 1)
            await there
            here = a.recv(back, 1)
            await b.send(out, 0)
            await here

        def wakeups() -> int:
            return device(a)["wakeups"] + device(b)["wakeups"]

        await round_trip()
        before = -1
        while wakeups() != before:  # pollers that wait for acknowledgements look again and again
            before = wakeups()
            await anyio.sleep(0.5)
        for _ in range(50):
            await round_trip()
        assert wakeups() - before < 10, "of 100 messages"


@pytest.mark.parametrize("near", [0, 1])
async def test_what_is_not_urged_on_goes_over_the_near_rail(near: int) -> None:
    nodes = ",".join(f"rxe{host}{rail}={int(rail != near)}" for host in "ab" for rail in range(2))
    async with hosts(2, AIOCOMM_RDMA_NODES=nodes) as (a, b):
        devices = [f"rxea{rail}" for rail in range(2)]
        before = device(a)
        for nbytes in (1000, 200_000):
            for number in range(7):  # so few that no word of credits is due
                sent, got = np.full(nbytes, number, np.uint8), np.zeros(nbytes, np.uint8)
                quiet = device(b)["sends"]
                receiving = b.recv(got, 0)
                if nbytes > 1000:
                    await until(lambda: device(b)["sends"] > quiet)  # noqa: B023
                    await heard(a, b)
                await a.send(sent, 1)
                await receiving
                np.testing.assert_array_equal(got, sent)
        grew = [
            {what: device(a)[f"{name}.{what}"] - before[f"{name}.{what}"] for what in ("sends", "writes")}
            for name in devices
        ]
        assert grew[near] == {"sends": 7, "writes": 7}
        assert grew[1 - near] == {"sends": 0, "writes": 0}


async def test_classes_of_channels_travel_by_queue_pairs_of_their_own() -> None:
    levels = {"AIOCOMM_RDMA_TRAFFIC_CLASS": "0,0,104,136", "AIOCOMM_RDMA_URGENT_TRAFFIC_CLASS": "136"}
    async with hosts(2, **levels) as (a, b):
        for priority in aiocomm.Priority:
            one, other = (comm.channel(priority.name, priority=priority) for comm in (a, b))
            sent, got = random(CHUNK + 9), np.zeros(CHUNK + 9, np.uint8)
            receiving = other.recv(got, 0)
            await one.send(sent, 1)
            await receiving
            np.testing.assert_array_equal(got, sent)


async def test_levels_that_differ_are_refused_by_name() -> None:
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    with mock.patch.dict(os.environ, {"AIOCOMM_RDMA_DEVICES": "rxea0"}):
        one = aiocomm.connect(address, rank=0, size=2, links=("rdma",))
    other_s = {"AIOCOMM_RDMA_DEVICES": "rxeb0", "AIOCOMM_RDMA_SERVICE_LEVEL": "0,0,1,1"}
    with mock.patch.dict(os.environ, other_s):
        other = aiocomm.connect(address, rank=1, size=2, links=("rdma",))
    seen = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(_refused, one, 1, *seen)
        group.start_soon(_refused, other, 0, *reversed(seen))


async def _refused(connecting: Any, rank: int, mine: anyio.Event, others: anyio.Event) -> None:
    async with connecting as comm:
        with pytest.raises(LinkError, match=r"rxe[ab]0 port 1.*AIOCOMM_RDMA_SERVICE_LEVEL"):
            await comm.send(b"x", rank, synchronous=True)
        mine.set()
        await others.wait()  # who left first would be gone for the other


async def test_an_unexpected_message_is_read() -> None:
    async with hosts(1) as (a, b):
        sending = a.send(random(CHUNK + 1), 1)
        await until(lambda: b.statistics().unexpected_messages)
        got = await b.recv_array(aiocomm.ANY_SOURCE)
        await sending
        np.testing.assert_array_equal(got, random(CHUNK + 1))
        assert (device(b)["reads"], device(a)["writes"], device(b)["writes"]) == (2, 0, 0)


async def key(a: aiocomm.Communicator, remote: aiocomm.RemoteRegion) -> None:
    """Have it asked for, and all that this takes acknowledged."""
    await a.put(bytes(8), remote[:8])


def frames(before: dict[str, int], after: dict[str, int]) -> int:
    return after["frames_received"] - before["frames_received"]


async def test_a_put_is_writes_and_costs_the_owner_nothing() -> None:
    async with hosts(1) as (a, b):
        sent, memory = random(2 * CHUNK + 5), np.zeros(2 * CHUNK + 5, np.uint8)
        async with b.register(memory) as region:
            remote = a.remote(region.handle)
            await key(a, remote)
            before = device(a), device(b)
            for nbytes in (2 * CHUNK + 5, 100):
                await a.put(sent[:nbytes], remote[:nbytes])
            np.testing.assert_array_equal(memory, sent)
            assert device(a)["writes"] - before[0]["writes"] == 4
            assert device(a)["sends"] == before[0]["sends"]
            assert frames(before[1], device(b)) == 0
            assert device(b)["immediates_received"] == before[1]["immediates_received"]
            assert device(b)["sends"] == before[1]["sends"]
            assert device(b)["reads"] == device(a)["reads"] == 0
            assert a.links["rdma"].statistics().messages_by_path["write"] == 3


async def test_a_get_is_reads_and_costs_the_owner_nothing() -> None:
    async with hosts(1) as (a, b):
        memory, got = random(2 * CHUNK + 5), np.zeros(2 * CHUNK + 5, np.uint8)
        async with b.register(memory) as region:
            remote = a.remote(region.handle)
            await key(a, remote)
            memory[:8] = 1
            before = device(a), device(b)
            await a.get(remote, got)
            np.testing.assert_array_equal(got, memory)
            assert device(a)["reads"] - before[0]["reads"] == 3
            assert device(a)["sends"] == before[0]["sends"]
            assert device(b)["sends"] == before[1]["sends"]
            assert frames(before[1], device(b)) == 0
            assert a.links["rdma"].statistics().messages_by_path["read"] == 1


async def test_a_notification_rides_on_the_last_write() -> None:
    async with hosts(2) as (a, b):
        sent, memory = random(4 * CHUNK + 5), np.zeros(4 * CHUNK + 5, np.uint8)
        async with b.register(memory) as region:
            remote = a.remote(region.handle)
            await key(a, remote)
            before = device(a), device(b)
            await a.put(sent, remote, notify=b"here")
            note = await anext(b.notifications())
            assert (note.source, note.payload, note.nbytes) == (0, b"here", sent.nbytes)
            np.testing.assert_array_equal(memory, sent)
            of_a = grown(device(a), before[0])
            assert (of_a["writes"], of_a["sends"], of_a["inline_sends"]) == (5, 1, 1)
            assert device(b)["immediates_received"] - before[1]["immediates_received"] == 1
            assert frames(before[1], device(b)) == 1
            assert device(b)["reads"] == 0


PIECES = 8  # stretches of memory that one request is about


async def test_pages_that_lie_apart_are_gathered_and_scattered_by_the_device() -> None:
    async with hosts(1) as (a, b):
        data, target = random(60 * 4096).reshape(60, 4096), np.zeros((60, 4096), np.uint8)
        give = np.random.default_rng(1).permutation(60)[:40]
        async with await b.lease_pages(aiocomm.Pages(target)) as lease:
            remote = a.remote_pages(lease.handle)
            await a.put_pages(aiocomm.Pages(data), [0], remote, [0])  # the key, and its memory registered
            before = device(a), device(b)
            await a.put_pages(aiocomm.Pages(data), give, remote, np.arange(20, 60))
            np.testing.assert_array_equal(target[20:60], data[give])
            assert grown(device(a), before[0])["writes"] == 40 // PIECES
            got, before = np.zeros_like(data), (device(a), device(b))
            await a.get_pages(remote, np.arange(20, 60), aiocomm.Pages(got), give)
            np.testing.assert_array_equal(got[give], data[give])
            assert grown(device(a), before[0])["reads"] == 40 // PIECES
            take = np.random.default_rng(2).permutation(60)[:40]
            before = device(a), device(b)
            await a.put_pages(aiocomm.Pages(data), give, remote, take)
            np.testing.assert_array_equal(target[take], data[give])
            assert grown(device(a), before[0])["writes"] <= 40
            assert frames(before[1], device(b)) == 0


async def test_a_rail_that_goes_down_under_scattered_pages() -> None:
    async with hosts(2) as (a, b):
        data = random(12_000 * 1024).reshape(12_000, 1024)
        target = np.zeros_like(data)
        give, take = (np.random.default_rng(seed).permutation(12_000)[:11_000] for seed in (1, 2))
        async with await b.lease_pages(aiocomm.Pages(target)) as lease:
            remote = a.remote_pages(lease.handle)
            await a.put_pages(aiocomm.Pages(data), give[:10], remote, take[:10])
            writes = device(a)["writes"]
            async with anyio.create_task_group() as tasks:
                put = partial(a.put_pages, aiocomm.Pages(data), give, remote, take, notify=b"there")
                tasks.start_soon(put)
                await until(lambda: device(a)["writes"] > writes + 500)
                down("a0")
            try:
                assert (await anext(b.notifications())).payload == b"there"
                np.testing.assert_array_equal(target[take], data[give])
                await failed_lane(a)
            finally:
                up("a0")
        await until(lambda: device(a)["lanes_recovered"] and device(b)["lanes_recovered"])


async def test_a_rail_that_goes_down_and_comes_back() -> None:
    async with hosts(2) as (a, b):
        events = a.events()
        sent, got = random(64 * MIB), np.zeros(64 * MIB, np.uint8)
        receiving = b.recv(got, 0)
        sending = a.send(sent, 1)
        await until(lambda: device(b)["immediates_received"] + device(b)["reads"] >= 3)
        down("a0")
        try:
            await sending
            await receiving
            np.testing.assert_array_equal(got, sent)
            await failed_lane(a)
            await a.send(sent[:100], 1)  # frames have gone over to the other rail, too
            await b.recv(got[:100], 0)
        finally:
            up("a0")
        await until(lambda: device(a)["lanes_recovered"] and device(b)["lanes_recovered"])
        first = await anext(events)
        if first == LinkUp("rdma", 1):  # of the pair, by which it is connected before it is told
            first = await anext(events)
        assert isinstance(first, LinkDown)
        assert (first.link, first.rank) == ("rdma/rxea0:1", 1)
        assert await anext(events) == LinkUp("rdma/rxea0:1", 1)
        moved = device(a)["rxea0.writes"] + device(b)["rxeb0.reads"]
        receiving = b.recv(got, 0)
        await a.send(sent, 1)
        await receiving
        assert device(a)["rxea0.writes"] + device(b)["rxeb0.reads"] > moved


async def test_a_rail_that_goes_down_under_puts_repeats_no_notification() -> None:
    async with hosts(2) as (a, b):
        nbytes, count = 16 * MIB, 6
        memory = np.zeros(count * nbytes, np.uint8)
        async with b.register(memory) as region:
            remote = a.remote(region.handle)
            sent = [random(nbytes + i)[:nbytes] for i in range(count)]
            putting = [
                a.put(block, remote[i * nbytes : (i + 1) * nbytes], notify=bytes((i,)))
                for i, block in enumerate(sent)
            ]
            await putting[0]
            down("a0")
            try:
                notes = b.notifications()
                told = []
                for _ in range(count):
                    told.append((await anext(notes)).payload[0])
                    i = told[-1]
                    np.testing.assert_array_equal(memory[i * nbytes : (i + 1) * nbytes], sent[i])
                for transfer in putting:
                    await transfer
                assert sorted(told) == list(range(count))
                await failed_lane(a)
                await a.put(b"", remote[:0], notify=b"end")
                assert (await anext(notes)).payload == b"end", "none came twice"
            finally:
                up("a0")
        await until(lambda: device(a)["lanes_recovered"] and device(b)["lanes_recovered"])


async def lose_both_rails(a: aiocomm.Communicator, b: aiocomm.Communicator) -> None:
    """In the middle of a message; both say that it was the link, unless that was through by then."""
    sent, got = random(64 * MIB), np.zeros(64 * MIB, np.uint8)
    sending, receiving = a.send(sent, 1), b.recv(got, 0)
    waiting = a.send(sent[:MIB], 1, tag=1)  # which nobody receives
    await until(lambda: device(b)["immediates_received"] + device(b)["reads"] >= 1)
    down("a0")
    down("a1")
    with pytest.raises(LinkError):
        await waiting
    ended = [await is_through(transfer) for transfer in (sending, receiving)]
    assert ended != [True, False], "what was sent has been received"
    if ended[1]:
        np.testing.assert_array_equal(got, sent)
    # What is begun before an end has heard of it would end with it.
    await until(lambda: not any(comm.links["rdma"].statistics().peers for comm in (a, b)))


async def is_through(transfer: aiocomm.Transfer) -> bool:
    try:
        await transfer
    except LinkError:
        return False
    return True


async def test_no_rail_left_is_an_error_of_the_link_at_both_ends() -> None:
    async with hosts(2) as (a, b):
        try:
            await lose_both_rails(a, b)
            assert all(peer.alive for comm in (a, b) for peer in comm.peers)
        finally:
            up("a0")
            up("a1")
        got = np.zeros(MIB, np.uint8)
        receiving = b.recv(got, 0)
        await a.send(random(MIB), 1)  # connects anew, over the same link
        await receiving
        np.testing.assert_array_equal(got, random(MIB))


async def test_no_rail_left_falls_back_to_tcp() -> None:
    async with hosts(2, links=("rdma", "tcp")) as (a, b):
        events = a.events()
        try:
            await lose_both_rails(a, b)
            for nbytes in (100, 2 * MIB):
                got = np.zeros(nbytes, np.uint8)
                receiving = b.recv(got, 0)
                await a.send(random(nbytes), 1)
                await receiving
                np.testing.assert_array_equal(got, random(nbytes))
            assert a.links["tcp"].statistics().completed == 2
            told = {}
            while Fallback not in told:
                event = await anext(events)
                told[type(event)] = event
            assert told[Fallback] == Fallback("rdma", 1, "tcp", "the link failed")
            assert told[LinkDown].link == "rdma"
            assert "no rail is left" in told[LinkDown].reason
        finally:
            up("a0")
            up("a1")


async def test_a_device_that_is_removed_in_use() -> None:
    async with hosts(2) as (a, b):
        sent, got = random(64 * MIB), np.zeros(64 * MIB, np.uint8)
        receiving = b.recv(got, 0)
        sending = a.send(sent, 1)
        await until(lambda: device(b)["immediates_received"] + device(b)["reads"] >= 3)
        await anyio.to_thread.run_sync(run, "rdma", "link", "delete", "rxea0")
        try:
            await sending
            await receiving
            np.testing.assert_array_equal(got, sent)
            await failed_lane(a)
            async with b.register(got) as region:
                await a.put(sent[:MIB], a.remote(region.handle)[MIB : 2 * MIB])
            np.testing.assert_array_equal(got[MIB : 2 * MIB], sent[:MIB])
        finally:
            run("rdma", "link", "add", "rxea0", "type", "rxe", "netdev", "a0")

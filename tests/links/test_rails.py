"""Messages over two rails, of simulated adapters: which go first, and when they have arrived."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fakes.adapters import HEADERS, Adapters, build
from harness import until, world

import aiocomm
from aiocomm.errors import LinkError, PeerLostError, TransferCancelled, UsageError

if TYPE_CHECKING:
    from conftest import Pair

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not HEADERS, reason="the rdma link is not built (apt install libibverbs-dev)"),
]


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rdma link runs on simulated adapters."""
    monkeypatch.setenv("AIOCOMM_LIBIBVERBS", str(build()))


def node_of_memory() -> int:
    """Where this process's memory lies; most machines have the node 0 only."""
    memory, node = np.ones(1, np.uint8), ctypes.c_int(-1)
    get_mempolicy = {"x86_64": 239, "aarch64": 236}[os.uname().machine]
    address = ctypes.c_void_p(memory.ctypes.data)
    ctypes.CDLL(None).syscall(get_mempolicy, ctypes.byref(node), None, 0, address, 3)
    return node.value


def by_device(comm: aiocomm.Communicator, *names: str) -> list[int]:
    """What each of the two devices has done, summed over counters."""
    device = comm.links["rdma"].statistics().device
    return [sum(device[f"fake{number}.{name}"] for name in names) for number in range(2)]


async def exchange(pair: Pair, nbytes: int, count: int) -> None:
    """Messages into receives that are there before, one after the other."""
    a, b = pair
    sent, got = np.full(nbytes, 3, np.uint8), np.zeros(nbytes, np.uint8)
    for _ in range(count):
        quiet = b.links["rdma"].statistics().frames_sent
        receiving = b.recv(got, 0)
        await until(lambda: nbytes < 100_000 or b.links["rdma"].statistics().frames_sent > quiet)  # noqa: B023
        await a.send(sent, 1)
        await receiving
        assert (got == 3).all()
        got.fill(0)


@pytest.mark.parametrize("near", [0, 1])
async def test_the_near_rail_goes_first(near: int, monkeypatch: pytest.MonkeyPatch) -> None:
    here = node_of_memory()
    nodes = [here if number == near else here + 1 for number in range(2)]
    monkeypatch.setenv("AIOCOMM_RDMA_NODES", f"fake0={nodes[0]},fake1={nodes[1]}")
    async with world(2, links=("rdma",), warmup=True) as pair:
        before = by_device(pair[0], "sends", "writes")
        await exchange((pair[0], pair[1]), 1000, 20)
        await exchange((pair[0], pair[1]), 200_000, 20)
        after = by_device(pair[0], "sends", "writes")
        assert after[near] - before[near] >= 40
        assert after[1 - near] == before[1 - near]


async def posted(pair: Pair, nbytes: int) -> tuple[aiocomm.Transfer, np.ndarray]:
    """A receive of rank 1 that rank 0 can write into."""
    a, b = pair
    got, quiet = np.zeros(nbytes, np.uint8), b.links["rdma"].statistics().frames_sent
    receiving = b.recv(got, 0, tag=1)
    await until(lambda: b.links["rdma"].statistics().frames_sent > quiet)
    answer = bytearray(5)
    await b.send(b"after", 0)
    await a.recv(answer, 1)
    return receiving, got


async def test_it_ends_with_the_last_chunk_of_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is posted last wakes the receiver; others may come after it, and nobody looks by chance."""
    monkeypatch.setenv("AIOCOMM_HEARTBEAT_S", "1000")
    async with world(2, links=("rdma",), warmup=True) as pair:
        for number in range(1, 6):
            nbytes = number * (2 << 20) + number
            receiving, got = await posted((pair[0], pair[1]), nbytes)
            await pair[0].send(np.full(nbytes, number, np.uint8), 1, tag=1)
            assert (await receiving).nbytes == nbytes
            assert (got == number).all()
        written = pair[1].links["rdma"].statistics().messages_by_path["write"]
        assert written == 5
        device = pair[0].links["rdma"].statistics().device
        assert min(device["fake0.writes"], device["fake1.writes"]) > 0


async def sending_on(comm: aiocomm.Communicator) -> None:
    while True:
        await comm.send(b"?", 1)


@pytest.mark.parametrize("event", [0, 14, 8], ids=["overrun queue", "broken receives", "device"])
async def test_a_broken_queue_takes_its_rail_out(event: int) -> None:
    """IBV_EVENT_CQ_ERR, _SRQ_ERR and _DEVICE_FATAL: nothing more would be heard of what is under way."""
    async with world(2, links=("rdma",), warmup=True) as (a, b):
        events = a.events()
        Adapters().tell(0, event)
        async for told in events:
            if isinstance(told, aiocomm.LinkDown):
                assert told.link == "rdma/fake0:1"
                break
        await exchange((a, b), 1000, 5)
        await exchange((a, b), 300_000, 5)
        Adapters().tell(1, event)
        with pytest.raises((LinkError, PeerLostError)):
            await sending_on(a)


@pytest.mark.parametrize("rails", [1, 2])
async def test_what_is_written_is_delivered_though_its_sender_leaves_at_once(
    rails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last word comes by another queue than the bytes."""
    monkeypatch.setenv("AIOCOMM_RDMA_DEVICES", ",".join(f"fake{rail}" for rail in range(rails)))
    for _ in range(8):
        async with world(2, links=("rdma",), warmup=True) as pair:
            receiving, got = await posted((pair[0], pair[1]), 9_000_000)
            await pair[0].send(np.full(9_000_000, 7, np.uint8), 1, tag=1)
            leaving = threading.Thread(target=pair[0]._engine.close)
            leaving.start()
            assert (await receiving).nbytes == 9_000_000
            assert (got == 7).all()
            leaving.join()


async def test_a_peer_that_is_slow_to_be_found_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On RoCE the kernel asks the network for it while the queue pair is connected."""
    monkeypatch.setenv("AIOCOMM_RDMA_DEVICES", "fake0")
    adapters = Adapters()
    async with world(3, links=("rdma",)) as (a, b, c):
        await exchange((a, b), 1000, 1)
        with adapters.holding(0):
            sending, into = a.send(b"late", 2), bytearray(4)
            receiving = c.recv(into, 0)
            await until(lambda: adapters.connecting == 2)  # of either end's
            await exchange((a, b), 1000, 5)
            await exchange((a, b), 300_000, 5)
        await receiving
        await sending
        assert into == b"late"
    assert adapters.pairs == 0


async def test_a_transfer_to_a_peer_that_is_not_found_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOCOMM_RDMA_DEVICES", "fake0")
    adapters = Adapters()
    async with world(2, links=("rdma",)) as (a, b):
        with adapters.holding(0):
            sending = a.send(b"never", 1)
            await until(lambda: adapters.connecting == 2)
            sending.cancel()
            with pytest.raises((asyncio.CancelledError, TransferCancelled)):
                await sending
        await exchange((a, b), 1000, 1)
    assert adapters.pairs == 0


@pytest.mark.parametrize("rails", [1, 2])
async def test_a_rail_without_a_way_says_so(rails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end that has found out first; the other one may have that from it."""
    monkeypatch.setenv("AIOCOMM_RDMA_DEVICES", ",".join(f"fake{rail}" for rail in range(rails)))
    why = "device fake0 port 1: no way from fe80::1 (GID index 0) to fe80::1 (Connection timed out)"
    async with world(2, links=("rdma",)) as (a, b):
        told = [a.events(), b.events()]
        with Adapters().unreachable(0, errno.ETIMEDOUT):
            if rails == 1:
                with pytest.raises(LinkError, match="no rail is left"):
                    await a.send(b"?", 1)
            else:
                await exchange((a, b), 1000, 1)
                await exchange((a, b), 300_000, 5)
                assert by_device(a, "writes")[0] == 0
        reasons = []
        for events in told:
            async for event in events:
                if isinstance(event, aiocomm.LinkDown):
                    assert event.link == ("rdma" if rails == 1 else "rdma/fake0:1")
                    reasons.append(event.reason)
                    break
        assert any(why in reason for reason in reasons)


@pytest.mark.parametrize(
    "call", ["open_device", "alloc_pd", "create_comp_channel", "create_cq", "create_srq"]
)
async def test_a_device_that_cannot_be_used_is_left_out(call: str) -> None:
    adapters = Adapters()
    with adapters.lacking(0, call, errno.ENOMEM):
        async with world(2, links=("rdma",)) as (a, b):
            events = a.events()
            await exchange((a, b), 1000, 1)
            await exchange((a, b), 300_000, 5)
            assert "fake0.writes" not in a.links["rdma"].statistics().device
            assert a.links["rdma"].statistics().fallbacks == 1
            async for event in events:
                if isinstance(event, aiocomm.Fallback):
                    assert event.path in ("without fake0", "without fake0:1")
                    assert "device fake0" in event.reason
                    assert "Cannot allocate memory" in event.reason
                    break
        with (
            adapters.lacking(1, call, errno.EPERM),
            pytest.raises(LinkError, match=r"fake0.*Cannot allocate memory.*fake1.*not permitted"),
        ):
            await aiocomm.connect(links=("rdma",))
    assert adapters.pairs == 0


@pytest.mark.parametrize("wrong", ["fake0", "fake0=", "fake0=x", "fake0=0,", "=1"])
async def test_nodes_that_make_no_sense(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOCOMM_RDMA_NODES", wrong)
    with pytest.raises(UsageError, match="AIOCOMM_RDMA_NODES must be like 'mlx5_0=0,mlx5_1=1'"):
        await aiocomm.connect()

"""Large memory is registered aside: nothing else waits for it, and it may be given up meanwhile.

Over simulated adapters, whose registrations wait for as long as a test wants.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes.adapters import HEADERS, Adapters, build
from harness import until, world

import aiocomm
from aiocomm.errors import LinkError, PeerLostError, TransferCancelled, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from conftest import Pair

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not HEADERS, reason="the rdma link is not built (apt install libibverbs-dev)"),
]

LARGE = 8 << 20
POISON = 0xAB
KINDS = ("send", "send into a receive", "receive", "posted receive", "put", "get")


@pytest.fixture
def adapters() -> Adapters:
    """The simulated adapters."""
    return Adapters()


@pytest.fixture
async def pair(monkeypatch: pytest.MonkeyPatch, adapters: Adapters) -> AsyncIterator[Pair]:
    """Two ranks over two rails."""
    monkeypatch.setenv("AIOCOMM_LIBIBVERBS", str(build()))
    async with world(2, links=("rdma",), warmup=True) as (a, b):
        yield a, b
    assert adapters.regions(0) == 0, "every registration is given back"


def frames_of(comm: aiocomm.Communicator) -> int:
    """How many it has sent."""
    return comm.links["rdma"].statistics().frames_sent


async def test_memory_that_cannot_be_written_is_sent_and_put(pair: Pair, tmp_path: Path) -> None:
    """Weights in a file that is mapped for reading: a device only reads them."""
    a, b = pair
    np.full(LARGE, 5, np.uint8).tofile(tmp_path / "weights")
    weights = np.memmap(tmp_path / "weights", np.uint8, "r")
    got, quiet = np.zeros(LARGE, np.uint8), frames_of(b)
    receiving = b.recv(got, 0, tag=1)
    await until(lambda: frames_of(b) > quiet)  # its offer
    await a.send(weights, 1, tag=1)
    await receiving
    assert (got == 5).all()
    got.fill(0)
    async with b.register(got) as region:
        await a.put(weights, a.remote(region.handle))
        assert (got == 5).all()
        with pytest.raises(UsageError):
            await a.get(a.remote(region.handle), into=weights)
    async with b.register(weights) as region:
        await a.get(a.remote(region.handle), into=got)
        assert (got == 5).all()


class Case:
    """An operation whose memory is large and not registered, and what belongs to it at the other end."""

    def __init__(self, pair: Pair, kind: str) -> None:
        self.pair = pair
        self.kind = kind
        self.ours = np.full(LARGE, 1, np.uint8)
        self.theirs = np.full(LARGE, 2, np.uint8)
        self.region: Any = None
        self.other: Any = None

    async def prepare(self) -> None:
        """What must be there before: the other end, whose memory is registered already."""
        a, b = self.pair
        if self.kind == "receive":
            self.other = b.send(self.theirs, 0, tag=1)
            await until(lambda: a.statistics().unexpected_messages)
        elif self.kind == "send into a receive":
            quiet = frames_of(b)
            self.other = b.recv(self.theirs, 0, tag=1)
            await until(lambda: frames_of(b) > quiet)  # its offer
            assert await self.echo() == b"after"
        elif self.kind in ("put", "get"):
            self.region = b.register(self.theirs)
            first = np.zeros(1, np.uint8)
            await a.get(a.remote(self.region.handle)[:1], first)

    async def echo(self) -> bytes:
        """A small message there and back, on a channel of its own."""
        a, b = self.pair
        got, back = bytearray(5), bytearray(5)
        urgent = [comm.channel("urgent", priority=aiocomm.Priority.URGENT) for comm in (a, b)]
        await urgent[0].send(b"after", 1)
        await urgent[1].recv(got, 0)
        await urgent[1].send(got, 0)
        await urgent[0].recv(back, 1)
        return bytes(back)

    def start(self) -> Any:
        a, _ = self.pair
        match self.kind:
            case "send" | "send into a receive":
                return a.send(self.ours, 1, tag=1)
            case "receive" | "posted receive":
                return a.recv(self.ours, 1, tag=1)
            case "put":
                return a.put(self.ours, a.remote(self.region.handle))
            case _:
                return a.get(a.remote(self.region.handle), self.ours)

    async def finish(self, transfer: Any) -> None:
        """To its end, and the bytes are right."""
        _, b = self.pair
        if self.kind == "send":
            self.other = b.recv(self.theirs, 0, tag=1)
        elif self.kind == "posted receive":
            self.other = b.send(self.theirs, 0, tag=1)
        await transfer
        if self.other is not None:
            await self.other
        if self.region is not None:
            await self.region.aclose()
        np.testing.assert_array_equal(self.ours, self.theirs)


@pytest.fixture(params=KINDS)
async def case(pair: Pair, request: pytest.FixtureRequest) -> Case:
    """One kind of operation, prepared."""
    made = Case(pair, request.param)
    await made.prepare()
    return made


async def test_others_go_on_meanwhile(case: Case, adapters: Adapters) -> None:
    with adapters.paused(LARGE):
        transfer = case.start()
        await until(lambda: adapters.waiting)
        assert await case.echo() == b"after"
        assert not transfer.done()
    await case.finish(transfer)


async def test_it_is_given_up_meanwhile(case: Case, adapters: Adapters) -> None:
    _, b = case.pair
    with adapters.paused(LARGE):
        transfer = case.start()
        await until(lambda: adapters.waiting)
        assert transfer.cancel()
        await until(transfer.done)  # it does not wait for its memory
        assert transfer.cancelled()
        case.ours.fill(POISON)
        assert await case.echo() == b"after"
    if case.other is not None:
        with pytest.raises(TransferCancelled):
            await case.other
    if case.region is not None:
        await case.region.aclose()
    await until(lambda: not adapters.regions(LARGE))
    assert (case.ours == POISON).all()
    if case.region is None:
        assert b.statistics().unexpected_messages == 0


async def test_its_deadline_comes_meanwhile(pair: Pair, adapters: Adapters) -> None:
    a, _ = pair
    with adapters.paused(LARGE):
        with pytest.raises(aiocomm.DeadlineExceeded):
            await a.recv(np.zeros(LARGE, np.uint8), 1, deadline=0.01)
        assert await Case(pair, "").echo() == b"after"


async def test_the_peer_is_lost_meanwhile(case: Case, adapters: Adapters) -> None:
    _, b = case.pair
    with adapters.paused(LARGE):
        transfer = case.start()
        await until(lambda: adapters.waiting)
        if case.other is not None:
            case.other.cancel()
        closing = threading.Thread(target=b._engine.close)  # no goodbye to the group: as if it had died
        closing.start()
        await until(transfer.done)
        with pytest.raises((PeerLostError, TransferCancelled)):
            transfer.result()
        case.ours.fill(POISON)
    closing.join()
    await until(lambda: not adapters.waiting)
    assert (case.ours == POISON).all()


async def test_it_is_closed_meanwhile(case: Case, adapters: Adapters) -> None:
    a, _ = case.pair
    with adapters.paused(LARGE):
        transfer = case.start()
        await until(lambda: adapters.waiting)
        later = threading.Thread(target=adapters.go_on)
        later.start()
        await a.aclose()
        later.join()
    assert transfer.done()


async def test_it_cannot_be(case: Case, adapters: Adapters) -> None:
    with adapters.refusing(LARGE, errno.ENOMEM):
        transfer = case.start()
        with pytest.raises(LinkError, match=r"could not be registered.*ulimit -l unlimited.*memlock=-1"):
            await transfer
    if case.other is not None:
        with pytest.raises((LinkError, TransferCancelled)):
            await case.other
    if case.region is not None:
        await case.region.aclose()
    assert await case.echo() == b"after"


async def test_a_region_is_registered_aside(pair: Pair, adapters: Adapters) -> None:
    a, b = pair
    memory, first = np.full(LARGE, 3, np.uint8), np.zeros(4, np.uint8)
    with adapters.paused(LARGE):
        region = b.register(memory)
        assert adapters.waiting == 0
        getting = a.get(a.remote(region.handle)[:4], first)
        await until(lambda: adapters.waiting)
        again = a.get(a.remote(region.handle)[4:8], np.zeros(4, np.uint8))
        assert await Case(pair, "").echo() == b"after"
        assert not getting.done()
    await getting
    await again
    assert (first == 3).all()
    await region.aclose()


async def test_a_region_is_closed_while_it_is_registered(pair: Pair, adapters: Adapters) -> None:
    a, b = pair
    with adapters.paused(LARGE):
        region = b.register(np.zeros(LARGE, np.uint8))
        getting = a.get(a.remote(region.handle)[:4], np.zeros(4, np.uint8))
        await until(lambda: adapters.waiting)
        await region.aclose()
        with pytest.raises(aiocomm.errors.StaleHandleError):
            await getting


async def test_a_region_that_cannot_be_registered_is_served(pair: Pair, adapters: Adapters) -> None:
    a, b = pair
    memory, got = np.arange(LARGE, dtype=np.uint8), np.zeros(64, np.uint8)
    async with b.register(memory) as region:
        with adapters.refusing(LARGE, errno.ENOMEM):
            await a.get(a.remote(region.handle)[:64], got)
    np.testing.assert_array_equal(got, memory[:64])
    assert b.links["rdma"].statistics().fallbacks == 1


# ---------------------------------------------------------------- given back aside: what a peer may write


async def written(pair: Pair, adapters: Adapters, sent: int = LARGE) -> tuple[aiocomm.Transfer, np.ndarray]:
    """A posted receive, written by its sender, whose memory is being given back.

    Its sender's is, too, where that is as large.
    """
    a, b = pair
    got, quiet = np.zeros(LARGE, np.uint8), frames_of(b)
    receiving = b.recv(got, 0, tag=1)
    await until(lambda: frames_of(b) > quiet)  # its offer
    assert await Case(pair, "").echo() == b"after"
    await a.send(np.full(sent, 7, np.uint8), 1, tag=1)
    await until(lambda: adapters.leaving == 1 + (sent >= LARGE))
    return receiving, got


async def test_others_go_on_while_it_is_given_back(pair: Pair, adapters: Adapters) -> None:
    with adapters.keeping(LARGE):
        receiving, got = await written(pair, adapters)
        assert await Case(pair, "").echo() == b"after"
        assert not receiving.done(), "a peer could still write into it"
        assert (got == 7).all()
    assert (await receiving).nbytes == LARGE
    await until(lambda: adapters.regions(LARGE) == 0)  # its sender's, too


async def test_it_is_cancelled_while_it_is_given_back(pair: Pair, adapters: Adapters) -> None:
    with adapters.keeping(LARGE):
        receiving, got = await written(pair, adapters)
        assert not receiving.cancel(), "its sender knows that it has come"
        assert await Case(pair, "").echo() == b"after"
        assert not receiving.done(), "a peer could still write into it"
    assert (await receiving).nbytes == LARGE
    assert (got == 7).all()
    await until(lambda: adapters.regions(LARGE) == 0)


async def test_the_peer_is_lost_while_it_is_given_back(pair: Pair, adapters: Adapters) -> None:
    a, b = pair
    with adapters.keeping(LARGE):
        receiving, got = await written(pair, adapters, sent=LARGE // 2)
        await a.aclose()  # whose own memory is not kept
        await until(lambda: not next(peer for peer in b.peers if peer.rank == 0).alive)
        assert not receiving.done()
    assert (await receiving).nbytes == LARGE // 2, "all of it had come"
    assert (got[: LARGE // 2] == 7).all()


async def test_all_is_closed_while_it_is_given_back(pair: Pair, adapters: Adapters) -> None:
    _, b = pair
    with adapters.keeping(LARGE):
        receiving, _ = await written(pair, adapters)
        later = threading.Thread(target=adapters.let_go)
        later.start()
        await b.aclose()
        later.join()
    assert receiving.done()


async def test_registering_does_not_hold_up_giving_back(pair: Pair, adapters: Adapters) -> None:
    _, b = pair
    with adapters.keeping(LARGE):
        receiving, _ = await written(pair, adapters)
        with adapters.paused(LARGE):
            next_one = b.recv(np.zeros(LARGE, np.uint8), 0, tag=1)
            await until(lambda: adapters.waiting)
            adapters.let_go()
            assert (await receiving).nbytes == LARGE
    next_one.cancel()
    await until(next_one.done)


async def test_a_large_region_is_given_back_aside(pair: Pair, adapters: Adapters) -> None:
    a, b = pair
    region, first = b.register(np.full(LARGE, 3, np.uint8)), np.zeros(4, np.uint8)
    await a.get(a.remote(region.handle)[:4], first)
    async with anyio.create_task_group() as group:
        with adapters.keeping(LARGE):
            group.start_soon(region.aclose)
            await until(lambda: adapters.leaving)
            assert await Case(pair, "").echo() == b"after"
            assert adapters.regions(LARGE) == 2, "one per adapter"
    assert adapters.regions(LARGE) == 0


async def test_messages_keep_their_order(pair: Pair, adapters: Adapters) -> None:
    """A small one does not overtake a large one whose memory is being registered."""
    a, b = pair
    large, small = np.full(LARGE, 5, np.uint8), np.full(16, 6, np.uint8)
    with adapters.paused(LARGE):
        sending = [a.send(large, 1, tag=2)]
        await until(lambda: adapters.waiting)
        sending.append(a.send(small, 1, tag=2))
        sending.append(a.send(small, 1, tag=2))
    for expected in (large, small, small):
        got = await b.recv_array(0, tag=2)
        np.testing.assert_array_equal(got, expected)
    for transfer in sending:
        await transfer


async def test_receives_are_offered_in_their_order(pair: Pair, adapters: Adapters) -> None:
    """Each of several that were posted while the first was being registered is written into."""
    a, b = pair
    buffers = [np.zeros(LARGE, np.uint8) for _ in range(3)]
    quiet = frames_of(b)
    with adapters.paused(LARGE):
        receiving = [b.recv(buffer, 0, tag=3) for buffer in buffers]
        await until(lambda: adapters.waiting)
    await until(lambda: frames_of(b) >= quiet + 3)  # the offers
    assert await Case(pair, "").echo() == b"after"
    for number in range(3):
        await a.send(np.full(LARGE, number, np.uint8), 1, tag=3)
    for number, (transfer, buffer) in enumerate(zip(receiving, buffers, strict=True)):
        await transfer
        assert (buffer == number).all()
    assert b.links["rdma"].statistics().messages_by_path["write"] == 3


async def test_a_large_send_that_must_not_wait(pair: Pair, adapters: Adapters) -> None:
    """It waits for its memory, which is no wait for the link."""
    a, b = pair
    with adapters.paused(LARGE):
        sending = a.send_nowait(np.full(LARGE, 7, np.uint8), 1)
        await until(lambda: adapters.waiting)
    got = await b.recv_array(0)
    await sending
    assert (got == 7).all()

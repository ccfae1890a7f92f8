"""`kill -9` of a process that stands at a step of the protocol: each step, in each role, over shm and tcp.

test_steps.py goes through more steps with a peer in the test's own process; test_kill.py kills processes with
a whole runtime, wherever they are.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from fault.rawpeer import connections, introduce
from fault.victims import LARGE, PORTION, STEPS, Maker
from harness import LIMIT_S, held, others_go_on, until, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from conftest import Pair

pytestmark = pytest.mark.anyio

LINKS = ["shm", "tcp"]


@pytest.fixture
def anyio_backend() -> str:
    """One loop: what is tested here is native."""
    return "asyncio"


@pytest.fixture(scope="module")
def maker() -> Iterator[Maker]:
    made = Maker()
    yield made
    made.close()


@pytest.fixture
async def pair(maker: Maker, endless: None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    # One thread that copies: the second would start when the first is busy, and count as left behind.
    monkeypatch.setenv("AIOCOMM_COPY_THREADS", "1")
    async with world(2, warmup=True) as (a, b):
        await others_go_on((a, b))  # threads that start with the first large transfer are there
        yield a, b


class Victim:
    """Rank 2 of `comm`'s world."""

    def __init__(
        self, maker: Maker, comm: aiocomm.Communicator, link: str, operation: str, step: str
    ) -> None:
        mine, theirs = connections(comm, link)
        self.generation = introduce(comm, 2, link, [sock.detach() for sock in mine])
        self._pid, self._report = maker.victim(link, theirs, operation, step)

    async def arrived(self) -> None:
        """Returns once it stands at its step."""
        await anyio.wait_readable(self._report)
        assert os.read(self._report, 1) == b"x", "the victim failed: see its traceback"

    def kill(self) -> None:
        """End it."""
        os.kill(self._pid, signal.SIGKILL)
        os.close(self._report)


async def told(transfer: Any) -> None:
    with pytest.raises(aiocomm.PeerLostError, match="gone") as caught:
        await transfer
    assert caught.value.peer == 2


async def assert_nothing_left(before: dict[str, int]) -> None:
    """The engine's thread lets go of the pair soon after its transfers have ended."""
    after: dict[str, int] = {}

    def nothing() -> bool:
        after.update(held())
        return all(after[what] <= before[what] for what in before)

    with anyio.move_on_after(LIMIT_S / 2):
        await until(nothing)
        return
    pytest.fail(f"{after} is more than {before}")


OPERATIONS: dict[str, Callable[[aiocomm.Communicator, Any, Any], Any]] = {
    "recv": lambda a, buffer, remote: a.recv(buffer, 2),
    "send": lambda a, buffer, remote: a.send(buffer, 2),
    "put": lambda a, buffer, remote: a.put(buffer, remote),
    "get": lambda a, buffer, remote: a.get(remote, buffer),
    "small put": lambda a, buffer, remote: a.put(b"small", remote, notify=b"n"),
    "synchronous send": lambda a, buffer, remote: a.send(b"small", 2, synchronous=True),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("operation", "step"), STEPS, ids=[": ".join(key) for key in STEPS])
async def test_the_peer_is_killed(pair: Pair, maker: Maker, link: str, operation: str, step: str) -> None:
    a, _ = pair
    writes = operation in ("recv", "get")
    buffer = np.zeros(LARGE, np.uint8)
    before = held()
    victim = Victim(maker, a, link, operation, step)
    remote = aiocomm.RemoteRegion(a, 2, victim.generation, 1, 0, LARGE, True)
    transfer = OPERATIONS[operation](a, buffer, remote)
    anybody = a.recv_array(2, tag=50)
    await victim.arrived()
    if step == "mid-chunk" and writes:
        await until(lambda: buffer[:PORTION].all())
    assert not transfer.done()
    victim.kill()
    await told(transfer)
    await told(anybody)
    buffer.fill(0xAB)
    with pytest.raises(aiocomm.PeerLostError):
        await a.send(b"x", 2)
    await others_go_on(pair)
    assert (buffer == 0xAB).all()
    await assert_nothing_left(before)


@pytest.mark.parametrize("step", ["before the greeting", "after the greeting"])
async def test_the_peer_is_killed_while_the_pair_is_made(pair: Pair, maker: Maker, step: str) -> None:
    a, _ = pair
    before = held()
    victim = Victim(maker, a, "shm", "connect", step)
    waiting = [a.send(b"x" * 10, 2, synchronous=True), a.send(bytes(LARGE), 2), a.recv(bytearray(1), 2)]
    await victim.arrived()
    victim.kill()
    for transfer in waiting:
        await told(transfer)
    await others_go_on(pair)
    await assert_nothing_left(before)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("operation", ["put", "get"])
async def test_who_accesses_a_region_is_killed(pair: Pair, maker: Maker, link: str, operation: str) -> None:
    """Our region closes: nobody waits for the dead one's access."""
    a, _ = pair
    before = held()
    memory = np.zeros(LARGE, np.uint8)
    region = a.register(memory)
    victim = Victim(maker, a, link, f"accesses by {operation}", str(region._number))
    await victim.arrived()
    victim.kill()
    with contextlib.suppress(aiocomm.PeerLostError):
        await a.recv(bytearray(1), 2)
    await region.aclose()
    memory.fill(0xAB)
    await others_go_on(pair)
    assert (memory == 0xAB).all()
    await assert_nothing_left(before)

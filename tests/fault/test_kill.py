"""`kill -9` of real processes: whoever waits for them is told, the others go on, nothing is left behind.

The steps inside a transfer are in test_steps.py, where a peer made by hand stands still at each of them.
Here the kernel ends real ones: while idle, stopped, sending, receiving, connecting, over every link.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from harness import LIMIT_S, Child, held, until

import aiocomm
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

LARGE = 64 << 20
GUEST = "AIOCOMM_RDMA_GUEST" in os.environ
# So much takes long enough for a kill in its middle.
MOVING = LARGE if GUEST else 1 << 29
MARK = 1 << 20  # the one byte of it that is not 0
# cuda carries no messages of its own; rdma needs a device, and is what the guest is for.
LINKS = (
    ["rdma"] if GUEST else [link for link in _core.available_links() if link not in ("self", "cuda", "rdma")]
)
HOST_A = {"AIOCOMM_RDMA_DEVICES": "rxea0,rxea1"} if GUEST else {}
HOST_B = {"AIOCOMM_RDMA_DEVICES": "rxeb0,rxeb1"} if GUEST else {}

WORKER = f"""
import asyncio, os, sys
import numpy as np
import aiocomm

LARGE, MOVING, MARK = {LARGE}, {MOVING}, {MARK}

def marked():
    array = np.zeros(MOVING, np.uint8)
    array[MARK] = 1
    return array

async def moving(array):
    # Says when the mark has come.
    while not array[MARK]:
        await asyncio.sleep(0)
    print("moving", flush=True)

async def main():
    role = sys.argv[1]
    async with aiocomm.connect(warmup=role != "cold") as comm:
        print("ready", flush=True)
        if role == "echo":
            for _ in range(2):
                array = await comm.recv_array(0)
                await comm.send(array, 0)
            return
        if role == "receives":
            array = np.empty(MOVING, np.uint8)
            array[MARK] = 0
            waiting = comm.recv(array, 0)
            await moving(array)
            while True:
                await waiting
                waiting = comm.recv(array, 0)
        elif role == "sends":
            array = marked()
            while True:
                await comm.send(array, 0)
        elif role == "receives little":
            waiting = comm.recv(bytearray(5), 0)
        elif role == "shares":
            shared = aiocomm.empty(LARGE, np.uint8)
            shared.fill(1)
            await comm.send(shared, 0)
        elif role in ("serves", "takes puts"):
            memory = marked() if role == "serves" else np.empty(MOVING, np.uint8)
            memory[MARK] = role == "serves"
            region = comm.register(memory)
            waiting = comm.send(region.handle, 0, tag=5)
            if role == "takes puts":
                await moving(memory)
        if role == "cold":
            await asyncio.Event().wait()  # a receive would call rank 0
        await comm.recv(bytearray(1), 0, tag=99)

asyncio.run(main())
"""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Two loops: processes take their time to start."""
    return str(request.param)


class World:
    """This process as rank 0, and children."""

    def __init__(self, start: Callable[..., Child], link: str) -> None:
        self._start = start
        self._link = link
        self.maps_peers = link == "shm"
        self.address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"

    async def open(self, *roles: str) -> tuple[aiocomm.Communicator, list[Child]]:
        """A child per role, with ranks from 1 on; all have joined."""
        size = str(len(roles) + 1)
        children = [
            self._start(
                WORKER,
                role,
                AIOCOMM_RANK=str(rank),
                AIOCOMM_SIZE=size,
                AIOCOMM_ADDRESS=self.address,
                AIOCOMM_LINKS=self._link,
                **HOST_B,
            )
            for rank, role in enumerate(roles, 1)
        ]
        comm = await aiocomm.connect(self.address, rank=0, size=int(size), links=(self._link,))
        for one in children:
            assert await one.line() == "ready", one.close()
        return comm, children


@pytest.fixture(params=LINKS)
def others(
    child: Callable[..., Child],
    request: pytest.FixtureRequest,
    endless: None,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    """Starts the world of a test."""
    for name, value in HOST_A.items():
        monkeypatch.setenv(name, value)
    return World(child, request.param)


async def told(transfer: Any, rank: int = 1) -> None:
    with pytest.raises(aiocomm.PeerLostError) as caught:
        await transfer
    assert caught.value.peer == rank


async def assert_echo(comm: aiocomm.Communicator, rank: int) -> None:
    for nbytes in (10, 1 << 20):
        sent = np.random.default_rng(3).integers(0, 255, nbytes, np.uint8)
        sending = comm.send(sent, rank)
        np.testing.assert_array_equal(await comm.recv_array(rank), sent)
        await sending


async def assert_nothing_left(before: dict[str, int], pipes: int) -> None:
    """`pipes`: of children that are still referred to."""
    kinds = ("descriptors", "segments", "mappings", "files")
    allowed = before | {"descriptors": before["descriptors"] + pipes}

    after: dict[str, int] = {}

    def nothing() -> bool:
        after.update(held())
        return all(after[what] <= allowed[what] for what in kinds)

    # The engine's thread closes what was a pair's; tasks of the communicator end in the loop's next turns.
    with anyio.move_on_after(LIMIT_S / 2):
        await until(nothing)
        return
    pytest.fail(f"{after} is more than {allowed}")


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
async def test_an_idle_peer(others: World, stopped: bool) -> None:
    before = held()
    comm, (victim, _) = await others.open("idle", "echo")
    waiting = [comm.recv(bytearray(1), 1), comm.recv_array(1), comm.send(bytes(LARGE), 1)]
    waiting.append(comm.send(b"x", 1, synchronous=True))
    events = comm.events()
    if stopped:
        victim.stop()
    victim.kill()
    for transfer in waiting:
        await told(transfer)
    async for event in events:
        if isinstance(event, aiocomm.PeerLost):
            assert event.rank == 1
            break
    assert [peer.alive for peer in comm.peers] == [False, True]
    with pytest.raises(aiocomm.PeerLostError):
        await comm.send(b"x", 1)
    await assert_echo(comm, 2)
    await comm.aclose()
    await assert_nothing_left(before, pipes=6)


@pytest.mark.parametrize("role", ["receives", "sends", "serves", "takes puts"])
async def test_in_the_middle_of_a_transfer(others: World, role: str) -> None:
    before = held()
    comm, (victim, _) = await others.open(role, "echo")
    ours = np.zeros(MOVING, np.uint8)
    if role in ("serves", "takes puts"):
        remote = comm.remote((await comm.recv_array(1, tag=5)).tobytes())
    ours[MARK] = role in ("receives", "takes puts")
    begin: dict[str, Callable[[], Any]] = {
        "receives": lambda: comm.send(ours, 1),
        "takes puts": lambda: comm.put(ours, remote),
        "sends": lambda: comm.recv(ours, 1),
        "serves": lambda: comm.get(remote, ours),
    }

    lost: list[int | None] = []

    async def one_after_the_other() -> None:
        """So that there is one under way, however late the kill comes."""
        while not lost:
            try:
                await begin[role]()
            except aiocomm.PeerLostError as error:
                lost.append(error.peer)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one_after_the_other)
        if role in ("receives", "takes puts"):
            assert await victim.line() == "moving"  # a receiver may read our memory, unseen from here
        else:
            await until(lambda: ours[MARK])
        victim.kill()
    assert lost == [1]
    ours[:: 1 << 16] = 0xAB
    await assert_echo(comm, 2)
    assert (ours[:: 1 << 16] == 0xAB).all()
    await comm.aclose()
    await assert_nothing_left(before, pipes=6)


@pytest.mark.skipif(GUEST, reason="the device reads the memory of a process that stands still")
async def test_after_the_match_and_before_its_data(others: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOCOMM_CMA", "off")  # else the memory of the stopped one is read
    before = held()
    comm, (victim, _) = await others.open("sends", "echo")
    await until(lambda: comm.statistics().unexpected_messages == 1)
    victim.stop()
    buffer = np.zeros(MOVING, np.uint8)
    transfer = comm.recv(buffer, 1)
    assert comm.statistics().unexpected_messages == comm.statistics().posted_receives == 0, "it is matched"
    assert not transfer.done()
    victim.kill()
    await told(transfer)
    assert not buffer[MARK]
    await assert_echo(comm, 2)
    await comm.aclose()
    await assert_nothing_left(before, pipes=6)


@pytest.mark.parametrize("what", ["send", "put"])
async def test_before_it_acknowledges(others: World, what: str) -> None:
    """All bytes have left, and the answer never comes."""
    before = held()
    comm, (victim, _) = await others.open("receives little" if what == "send" else "serves", "echo")
    remote = None if what == "send" else comm.remote((await comm.recv_array(1, tag=5)).tobytes())
    victim.stop()
    sent = frames_sent(comm)
    transfer: Any = comm.put(b"small", remote) if remote else comm.send(b"small", 1, synchronous=True)
    await until(lambda: frames_sent(comm) > sent)
    assert not transfer.done()
    victim.kill()
    await told(transfer)
    await assert_echo(comm, 2)
    await comm.aclose()
    await assert_nothing_left(before, pipes=6)


def frames_sent(comm: aiocomm.Communicator) -> int:
    return sum(link.frames_sent for link in comm.statistics().links.values())


async def test_a_peer_that_dies_with_others_waiting_for_anybody(others: World) -> None:
    """A wildcard receive can still be served by those who live, and fails when nobody is left."""
    before = held()
    comm, (one, other) = await others.open("idle", "idle")
    waiting = comm.recv(bytearray(1))
    one.kill()
    await until(lambda: not comm.peers[0].alive)
    assert not waiting.done()
    other.kill()
    with pytest.raises(aiocomm.PeerLostError):
        await waiting
    await comm.aclose()
    await assert_nothing_left(before, pipes=6)


async def test_while_a_pair_is_being_connected(others: World) -> None:
    """The peer has joined, stands still, and dies while it is called."""
    before = held()
    comm, (victim, _) = await others.open("cold", "cold")
    victim.stop()
    waiting = [comm.send(b"x", 1), comm.recv(bytearray(1), 1), comm.send(bytes(1 << 20), 1)]
    await anyio.lowlevel.checkpoint()
    victim.kill()
    for transfer in waiting:
        await told(transfer)
    await comm.aclose()
    await assert_nothing_left(before, pipes=6)


async def test_before_everybody_has_joined(child: Callable[..., Child]) -> None:
    """A world that never gets complete ends in an error, not in silence."""
    before = held()
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    start = child(WORKER, "idle", AIOCOMM_RANK="1", AIOCOMM_SIZE="3", AIOCOMM_ADDRESS=address)

    async def kill() -> None:
        await until(lambda: address[7:] in Path("/proc/net/unix").read_text())
        start.kill()

    async with anyio.create_task_group() as group:
        group.start_soon(kill)
        with pytest.raises(aiocomm.AiocommError):
            await aiocomm.connect(address, rank=0, size=3, deadline=1.0)
    await assert_nothing_left(before, pipes=3)


@pytest.mark.parametrize("how", ["late", "cancelled"])
async def test_nothing_is_left_when_connect_has_failed(how: str) -> None:
    for _ in range(5):
        before = held()
        address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
        if how == "late":
            with pytest.raises(aiocomm.DeadlineExceeded):
                await aiocomm.connect(address, rank=0, size=2, deadline=0.05)
        else:
            with anyio.move_on_after(0.05) as scope:
                await aiocomm.connect(address, rank=0, size=2)
            assert scope.cancelled_caught
        await assert_nothing_left(before, pipes=0)


async def test_everybody_is_killed_and_nothing_is_left(others: World) -> None:
    before = held()
    comm, children = await others.open("receives", "sends")
    shared = aiocomm.empty(1 << 20, np.uint8)
    transfers: list[Any] = [comm.send(shared, 1), comm.recv_array(2)]
    for one in children:
        one.kill()
    for transfer in transfers:
        await until(transfer.done)
        if transfer.exception() is not None:
            assert isinstance(transfer.exception(), aiocomm.PeerLostError)
    await comm.aclose()
    del shared, transfers
    await assert_nothing_left(before, pipes=6)


async def test_a_peer_that_dies_as_it_wakes_the_loop(others: World) -> None:
    """It has said so in the word that they share, which spares others the same, and not yet rung."""
    asleep, awake = b"\1\0\0\0", b"\0\0\0\0"

    def pages() -> set[Path]:
        return {one for one in Path("/proc/self/fd").iterdir() if "aiocomm-wake" in str(one.resolve())}

    before = pages()
    comm, (dying,) = await others.open("echo")
    receive = comm.recv(bytearray(1), 1)
    (page,) = pages() - before
    with page.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE) as words:
        await until(lambda: words[:4] == asleep)
        words[:4] = awake
    dying.kill()
    dying.process.wait()
    with pytest.raises(aiocomm.PeerLostError):
        await receive
    await comm.aclose()


async def test_memory_of_dead_peers_goes_back_while_others_live(others: World) -> None:
    before = held()["mappings"]
    comm, (living, *dying) = await others.open("echo", "shares", "shares")
    out = np.empty(LARGE, np.uint8)
    for rank in (2, 3):
        await comm.recv(out, rank)
    for one in dying:
        one.kill()
    for rank in (2, 3):
        await told(comm.recv(out, rank), rank)
    # All of theirs is unmapped, rings and what has been received; left are the rings of a pair.
    await until(lambda: held()["mappings"] <= before + others.maps_peers)
    await assert_echo(comm, 1)
    assert not living.process.poll()
    await comm.aclose()


async def test_threads_end_with_their_communicator() -> None:
    async with aiocomm.connect() as comm:
        receiving = comm.recv(bytearray(8 << 20), 0)
        await comm.send(bytes(8 << 20), 0)
        await receiving
        assert "aiocomm-engine" in threads()
    # The kernel lists a thread that has been joined for a moment longer.
    await until(lambda: not [name for name in threads() if name.startswith("aiocomm")])


def threads() -> list[str]:
    """Names of those that have not ended meanwhile."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            names.append((task / "comm").read_text().strip())
    return names

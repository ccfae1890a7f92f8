"""Worlds inside one process, child processes, and a look at what a process holds: for the runtime's tests.

Two communicators of one world may live in one process, on one loop: `world()` makes them in milliseconds,
over the links' real sockets and segments. Tests that need a second process use `aiocomm.spawn`, or `Child`
where the process is to be stopped, killed or looked into.
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
import numpy as np

import aiocomm
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

# After which something hangs; an emulated machine is slow.
LIMIT_S: Final = 300 if "AIOCOMM_RDMA_GUEST" in os.environ else 60

ENDLESS: Final = {f"AIOCOMM_{name}_S": "600" for name in ("HEARTBEAT", "DRAIN_TIMEOUT", "HANDSHAKE_TIMEOUT")}
"""With this environment no time limit of the runtime is over before a test's: what is told of a death is told
by the death itself. How soon, on a machine that does nothing else, `aiocomm bench faults` measures.
"""


@contextlib.asynccontextmanager
async def world(size: int = 2, **options: Any) -> AsyncIterator[list[aiocomm.Communicator]]:
    """A world whose members all live on this loop. Closes the members that the test has not closed."""
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    members: list[aiocomm.Communicator | None] = [None] * size

    async def join(rank: int) -> None:
        members[rank] = await aiocomm.connect(address, rank=rank, size=size, **options)

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            for rank in range(size):
                group.start_soon(join, rank)
    joined = [member for member in members if member is not None]
    try:
        yield joined
    finally:
        with anyio.fail_after(LIMIT_S):
            for member in reversed(joined):  # rank 0 is where the others are registered
                await member.aclose()


_PF_EXITING: Final = 4  # of the flags in /proc/*/stat

BACKENDS: Final = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
"""The loops on which coroutine tests run, for anyio."""


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something is so. Events are better where there are any."""
    while not condition():
        await anyio.lowlevel.checkpoint()


@contextlib.contextmanager
def reserved_port(family: int = socket.AF_INET, host: str = "127.0.0.1") -> Iterator[int]:
    """A port at which a server of ours may listen, and that nobody is given who asks for any free one."""
    with socket.socket(family) as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, which may share it then
        keeper.bind((host, 0))
        yield keeper.getsockname()[1]


class Child:
    """A process that runs Python source; it can be spoken to, stopped, and killed."""

    def __init__(self, source: str, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", source, *arguments],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    async def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        text = await anyio.to_thread.run_sync(self.process.stdout.readline, abandon_on_cancel=True)
        return text.decode().strip()

    def tell(self, text: str) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """Stop it where it is; returns once it stands still."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def kill(self) -> None:
        """End it without a chance to say anything."""
        self.process.kill()

    def close(self) -> tuple[int, str]:
        """Wait for its end; returns its exit status and what it wrote to standard error."""
        assert self.process.stderr is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.stdin.close()  # type: ignore[union-attr]
        errors = self.process.stderr.read().decode()
        self.process.stdout.close()  # type: ignore[union-attr]
        self.process.stderr.close()
        return self.process.wait(), errors


async def all_call(comms: list[aiocomm.Communicator], call: Callable[[aiocomm.Communicator], Any]) -> None:
    """Run a call on all ranks at once."""
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            for comm in comms:
                tasks.start_soon(call, comm)


async def messages_pass(a: aiocomm.Communicator, b: aiocomm.Communicator, times: int = 1) -> None:
    """Messages go from rank 0 to rank 1: what was sent and posted before has had its turns."""
    for _ in range(times):
        receiving = b.recv(bytearray(1), 0)
        await a.send(b"x", 1)
        await receiving


async def held_up(
    comms: list[aiocomm.Communicator],
    call: Callable[[aiocomm.Communicator], Any],
    gates: list[Any],
    ended: list[int],
) -> None:
    """Run a call on both ranks: messages come and go, but while there are shut gates no rank has `ended`."""
    async with anyio.create_task_group() as tasks:
        for comm in comms:
            tasks.start_soon(call, comm)
        await messages_pass(comms[0], comms[1], times=3)
        assert not (gates and ended)
        for gate in gates:
            gate.open()


async def given_up_halfway(
    comms: list[aiocomm.Communicator],
    call: Callable[[aiocomm.Communicator], Any],
    simulator: Any,
    engine: Any,
) -> None:
    """Rank 1 cancels a call while GPU 0 is kept from its part: both end once that is over."""
    gives_up, ended = anyio.CancelScope(), []

    async def last(comm: aiocomm.Communicator) -> None:
        with gives_up if comm.rank else contextlib.suppress(aiocomm.TransferCancelled):
            await call(comm)
        ended.append(comm.rank)

    simulator.pause(0, engine)
    async with anyio.create_task_group() as tasks:
        for comm in comms:
            tasks.start_soon(last, comm)
        await anyio.to_thread.run_sync(simulator.wait_ready, 0, engine)
        gives_up.cancel()
        for _ in range(5):
            receiving = comms[1].recv(bytearray(1), 0)
            await comms[0].send(b"x", 1)
            await receiving
        assert not ended
        simulator.resume(0, engine)
    assert sorted(ended) == [0, 1]
    assert gives_up.cancelled_caught


async def reach_each_other(pair: tuple[aiocomm.Communicator, aiocomm.Communicator]) -> None:
    """Whatever became of a third one, messages go between these two."""
    a, b = pair
    for nbytes in (10, 1 << 20):
        sent, got = np.full(nbytes, 3, np.uint8), np.zeros(nbytes, np.uint8)
        sending = a.send(sent, 1, tag=77)
        await b.recv(got, 0, tag=77)
        await sending
        np.testing.assert_array_equal(got, sent)


async def others_go_on(pair: tuple[aiocomm.Communicator, aiocomm.Communicator]) -> None:
    """The two reach each other, and nothing is left under way at the first."""
    await reach_each_other(pair)
    await until(lambda: pair[0].statistics().in_flight == 0)


def threads() -> Iterator[str]:
    """The names of this process's threads, by which others than Python see them.

    Without those that end: the kernel lists for a moment longer whoever has been joined.
    """
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            if not int(rest.split()[6]) & _PF_EXITING:
                yield name


async def held_at_rest() -> dict[str, int]:
    """What is held once all GPU memory that was to go back is back: the thread that does it ends then."""
    await until(lambda: _core.given_back(0) and "aiocomm-gpuend" not in threads())
    return held()


def held() -> dict[str, int]:
    """What this process and this machine hold now, to be compared before and after."""
    gc.collect()

    def count(folder: str, prefix: str = "") -> int:
        with contextlib.suppress(FileNotFoundError):
            return sum(name.startswith(prefix) for name in os.listdir(folder))
        return 0

    # Rings and arrays, of peers or for them. The page for wake-ups is the communicator's, which may live.
    maps = Path("/proc/self/maps").read_text()
    shared = maps.count("memfd:aiocomm-pair") + maps.count("memfd:aiocomm-array")
    return {
        "descriptors": count("/proc/self/fd"),
        # Without those of a simulated driver, which has another engine work when it is needed.
        "threads": sum(not name.startswith("fake-") for name in threads()),
        "segments": count("/dev/shm", "aiocomm"),  # others come and go, of whoever tests beside
        "mappings": shared,  # memory of peers, or for them
        "files": count("/tmp", "aiocomm"),  # tests and benchmarks name theirs otherwise
    }

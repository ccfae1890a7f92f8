"""Processes that fork while they are in a world: the child keeps nothing from the parent, and is told so."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
from harness import reserved_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from harness import Child

pytestmark = pytest.mark.anyio

SOURCE = """
import os, signal, sys, warnings
import anyio, numpy as np
import aiocomm

async def refused(what, call):
    try:
        result = call()
        if hasattr(result, "__await__"):
            await result
        return f"{what}: it seems to work"
    except aiocomm.UsageError as error:
        return f"{what}: {error}"

async def child(comm):
    signal.alarm(20)
    for what, call in (
        ("send", lambda: comm.send(b"x", dst=0)),
        ("recv", lambda: comm.recv_array(src=0)),
        ("register", lambda: comm.register(np.zeros(4))),
        ("barrier", lambda: comm.barrier()),
        ("group", lambda: comm.group([0])),
        ("aclose", lambda: comm.aclose()),
        ("from_thread", lambda: comm.from_thread.recv_array(0)),
    ):
        print(await refused(what, call), flush=True)

async def main(address):
    comm = await aiocomm.connect(address, rank=0, size=1, token="t")
    held, holds = os.pipe()  # keeps the child, and what it has of this process
    pid = os.fork()
    if not pid:
        try:
            os.close(holds)
            await child(comm)
            print("told", flush=True)
            os.read(held, 1)
        finally:
            os._exit(0)
    os.close(held)
    print("closing" if (await anyio.to_thread.run_sync(sys.stdin.readline)) else "lost", flush=True)
    await comm.aclose()
    for _ in range(2):
        comm = await aiocomm.connect(address, rank=0, size=1, token="t")
        await comm.aclose()
    print("connected again", flush=True)
    os.close(holds)
    os.waitpid(pid, 0)

warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads
anyio.run(main, sys.argv[1], backend=sys.argv[2])
"""
CALLS = ("send", "recv", "register", "barrier", "group", "aclose", "from_thread")


GPUS = """
import os, signal, sys, warnings
import anyio
import aiocomm
from fakes.gpu import DeviceArray

async def transfer(array):
    async with await aiocomm.connect(sys.argv[1], rank=0, size=1, token="t") as comm:
        try:
            received = comm.recv(array, 0)
            await comm.send(array, 0)
            await received
        except aiocomm.LinkError as error:
            return f"{error.code}: {error}"

warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads
array = DeviceArray(16)
if sys.argv[2] == "transfer":
    print(anyio.run(transfer, array), flush=True)
pid = os.fork()
if not pid:
    signal.alarm(30)
    try:
        print(anyio.run(transfer, array), flush=True)
    finally:
        os._exit(0)
os.waitpid(pid, 0)
print(anyio.run(transfer, array), flush=True)
"""


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("started", ["transfer", "elsewhere"])
@pytest.mark.usefixtures("gpu")
async def test_a_child_of_a_process_that_uses_gpus_says_how_to_start_it(
    started: str, child: Callable[..., Child]
) -> None:
    """Whether CUDA was started by a transfer or by another library."""
    program = child(GPUS, f"unix://@aiocomm-test-{secrets.token_hex(8)}", started)
    if started == "transfer":
        assert await program.line() == "None"
    line = await program.line()
    assert line.startswith("3: ")
    assert "'spawn' or 'forkserver'" in line
    assert await program.line() == "None"  # the parent goes on
    assert program.close() == (0, "")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize("kind", ["abstract", "path", "tcp"])
async def test_a_child_refuses_and_leaves_the_address_free(
    kind: str, loop: str, tmp_path: Path, child: Callable[..., Child]
) -> None:
    with reserved_port() as port:
        address = {
            "abstract": f"unix://@aiocomm-test-{secrets.token_hex(8)}",
            "path": f"unix://{tmp_path}/socket",
            "tcp": f"tcp://127.0.0.1:{port}",
        }[kind]
        program = child(SOURCE, address, loop)
        for call in CALLS:
            assert (await program.line()).startswith(f"{call}: this process was forked from the one")
        assert await program.line() == "told"
        program.tell("")
        assert await program.line() == "closing"
        assert await program.line() == "connected again"
        status, errors = program.close()
    assert (status, errors) == (0, "")

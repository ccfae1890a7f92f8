"""A name server that does not answer holds up what is asked of it, never the loop nor a process's end."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from harness import LIMIT_S, until

import aiocomm
from aiocomm import communicator
from aiocomm._control import client, host
from aiocomm._control.testing import Member
from aiocomm._process import fresh_address
from aiocomm.config import Settings
from aiocomm.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Once it is set, nobody knows slow.example."""
    answered, look_up = threading.Event(), socket.getaddrinfo

    def slow(name: Any, *rest: Any, **options: Any) -> Any:
        if name != "slow.example":
            return look_up(name, *rest, **options)
        answered.wait(LIMIT_S)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    yield answered
    answered.set()


async def test_the_loop_goes_on_while_what_is_closed_still_looks_up_a_name(
    answered: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_LOOK_UP_S", 0.01)
    monkeypatch.setattr(communicator, "_ABANDON_S", LIMIT_S)
    monkeypatch.setenv("AIOCOMM_HOST", "slow.example")
    comm = await aiocomm.connect(fresh_address(), rank=0, size=1)
    ended = []

    async def close() -> None:
        await comm.aclose()
        ended.append(comm._plane.ended.done())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(close)
        await until(lambda: comm._plane._closing is not None and comm._plane._closing.done())
        for _ in range(20):  # who closes has heard of that by then
            await anyio.lowlevel.checkpoint()
        answered.set()
    assert ended == [True]


@pytest.mark.parametrize(
    ("address", "rank", "settings", "told"),
    [
        ("tcp://slow.example:0", 0, Settings(), "the address"),
        ("tcp://slow.example:1", 1, Settings(), "the address"),
        ("tcp://127.0.0.1:1", 1, Settings(host="slow.example"), "AIOCOMM_HOST"),
    ],
)
def test_whose_time_is_over_meanwhile_is_told_of_the_name(
    address: str,
    rank: int,
    settings: Settings,
    told: str,
    answered: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "_QUIET_S", 0.0)
    member = Member(address, rank, 2, settings=settings, token="ours", timeout_s=0.05)
    with pytest.raises(DeadlineExceeded, match=f"the name in {told} is still looked up, and no name server"):
        member.joined()
    answered.set()
    member.close()


PROGRAM = """
import asyncio, os, socket, threading
import aiocomm

def slow(name, *rest, **options):
    threading.Event().wait()

async def main():
    socket.getaddrinfo = slow
    try:
        await aiocomm.connect("tcp://slow.example:1", rank=1, size=2, token="ours", deadline=0.05)
    except aiocomm.DeadlineExceeded:
        print("given up")

asyncio.run(main())
"""


def test_a_process_ends_while_a_name_is_still_looked_up() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], timeout=LIMIT_S, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "given up\n", "")

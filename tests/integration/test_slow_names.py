"""A name server that does not answer: it holds up what is asked of it, and never the loop."""

from __future__ import annotations

import socket
import threading
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from harness import LIMIT_S, until

import aiocomm
from aiocomm import communicator
from aiocomm._control import host
from aiocomm._process import fresh_address

pytestmark = pytest.mark.anyio


async def test_the_loop_goes_on_while_what_is_closed_still_looks_up_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered, look_up = threading.Event(), socket.getaddrinfo

    def slow(name: Any, *rest: Any, **options: Any) -> Any:
        if name != "slow.example":
            return look_up(name, *rest, **options)
        answered.wait(LIMIT_S)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
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

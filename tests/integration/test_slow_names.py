"""A name server that does not answer: it holds up what is asked of it, and never the loop."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from harness import LIMIT_S, until

import aiocomm
from aiocomm import communicator
from aiocomm._control import host
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
        ("tcp://127.0.0.1:1", 1, Settings(host="slow.example"), "AIOCOMM_HOST"),
    ],
)
def test_whose_time_is_over_meanwhile_is_told_of_the_name(
    address: str, rank: int, settings: Settings, told: str, answered: threading.Event
) -> None:
    member = Member(address, rank, 2, settings=settings, token="ours", timeout_s=0.05)
    with pytest.raises(DeadlineExceeded, match=f"the name in {told} is still looked up, and no name server"):
        member.joined()
    answered.set()
    member.close()

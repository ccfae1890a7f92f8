"""The rendezvous, with members whose connections are the test's."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from aiocomm._control import messages
from aiocomm._control import rendezvous as rendezvous_module
from aiocomm._control.rendezvous import Rendezvous
from aiocomm._control.stream import ConnectionClosedError
from aiocomm._control.wire import FrameParser
from aiocomm.config import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from aiocomm._control.stream import Stream


class _Line:
    """A member's connection: what it says comes from the test, and what it is told goes there."""

    is_unix = True

    def __init__(self) -> None:
        self.said: asyncio.Queue[messages.Message | None] = asyncio.Queue()
        self.told: list[messages.Message] = []
        self.more = asyncio.Event()
        self.reads = asyncio.Event()  # while it is not set, nothing gets through to the member
        self.reads.set()
        self._parser = FrameParser()

    async def receive(self) -> messages.Message:
        message = await self.said.get()
        if message is None:
            raise ConnectionClosedError("the other end closed the connection")
        return message

    async def send_frames(self, frames: list[bytes]) -> None:
        await self.reads.wait()
        for frame in frames:
            self.told += self._parser.feed(frame)
        self.more.set()

    def watch_silence(self, heartbeat_s: float) -> None:
        pass

    async def until(self, wanted: Callable[[messages.Message], bool]) -> None:
        while not any(map(wanted, self.told)):
            self.more.clear()
            await self.more.wait()


async def _join(rendezvous: Rendezvous, rank: int, size: int = 2) -> tuple[_Line, asyncio.Task[None]]:
    line = _Line()
    card = messages.PeerCard(rank, 0, None, "here", "here", 7 + rank, 1, 1, (), ("shm",), ())
    line.said.put_nowait(messages.Join(rank, size, (), card))
    serving = asyncio.create_task(rendezvous._serve(cast("Stream", line)))
    await line.until(lambda told: isinstance(told, messages.Welcome))
    return line, serving


def test_who_takes_a_rank_while_its_last_holder_is_still_told_goodbye_is_told_of_others() -> None:
    async def take_over() -> None:
        rendezvous = Rendezvous(2, None, Settings(), None)
        zero, serving_zero = await _join(rendezvous, 0)
        old, serving_old = await _join(rendezvous, 1)
        old.reads.clear()
        old.said.put_nowait(messages.Goodbye())
        await zero.until(lambda told: isinstance(told, messages.Gone))
        new, serving_new = await _join(rendezvous, 1)
        old.reads.set()
        await serving_old
        zero.said.put_nowait(messages.Goodbye())
        await serving_zero
        await new.until(lambda told: told == messages.Gone(0, zero_generation(new), True, "left"))
        new.said.put_nowait(messages.Goodbye())
        await serving_new
        assert isinstance(new.told[-1], messages.Farewell)

    def zero_generation(line: _Line) -> int:
        joined = [told for told in line.told if isinstance(told, messages.Joined)]
        return next(card.generation for told in joined for card in told.cards if card.rank == 0)

    asyncio.run(asyncio.wait_for(take_over(), 30.0))


def test_a_newcomer_is_not_dropped_for_the_number_of_those_who_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous_module, "_OUTBOX_BYTES", 400)
    monkeypatch.setattr(rendezvous_module, "_GATHER_S", 0.0)  # so that no arrivals are told together

    async def grow() -> None:
        rendezvous = Rendezvous(16, None, Settings(), None)
        members = [await _join(rendezvous, rank, 16) for rank in range(16)]
        for line, _ in members:
            await line.until(lambda told: isinstance(told, messages.Ready))
        members[0][0].reads.clear()  # who does not read is, as ever
        for line, serving in members[1:]:
            line.said.put_nowait(None)
            await serving
        await members[0][1]

    asyncio.run(asyncio.wait_for(grow(), 30.0))

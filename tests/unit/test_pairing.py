"""Connections that cannot be made: what a newcomer that warms up makes of them."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, cast

import pytest
from harness import LIMIT_S

from aiocomm._control import messages
from aiocomm._control.calls import Opening
from aiocomm._control.dialing import UnansweredError
from aiocomm._control.messages import PeerCard
from aiocomm._control.pairing import Pairing
from aiocomm._control.testing import RecordingEngine

if TYPE_CHECKING:
    from aiocomm._control.limit import Step
    from aiocomm._control.stream import Stream


def card(rank: int, links: tuple[str, ...] = ("shm",)) -> PeerCard:
    return PeerCard(rank, 1, None, "here", "here", 1, "", 1, (), links, ("unix://@nobody",))


class Failing(RecordingEngine):
    """Says on the loop when a call was given up."""

    def __init__(self) -> None:
        super().__init__()
        self.gave_up = asyncio.Event()

    def fail_connect(self, rank: int, reason: str) -> None:
        super().fail_connect(rank, reason)
        self.gave_up.set()


async def refusing(card: PeerCard, kind: str | None, step: Step) -> Stream:
    raise ConnectionRefusedError("nobody listens")


def pairing(engine: RecordingEngine, timeout_s: float, links: tuple[str, ...] = ("shm",)) -> Pairing:
    found = Pairing(card(0, links), engine, refusing, timeout_s, 128, lambda *_: None)
    found.add(card(1, links))
    return found


class Line:
    """A connection of a caller that says what it is to say, and then nothing until it ends."""

    def __init__(self, *said: messages.Message, breaks_at: type[messages.Message] | None = None) -> None:
        self._said = list(said)
        self._breaks_at = breaks_at
        self.told: list[messages.Message] = []
        self.silent, self.ends = asyncio.Event(), asyncio.Event()

    async def receive(self) -> messages.Message:
        if self._said:
            return self._said.pop(0)
        self.silent.set()
        await self.ends.wait()
        raise ConnectionResetError("it has ended")

    async def send(self, message: messages.Message) -> None:
        if isinstance(message, self._breaks_at or ()):
            raise ConnectionResetError("it broke")
        self.told.append(message)

    def close(self) -> None:
        """There is nothing to close."""


OFFER = messages.Offer(b"a try", 1, 1, 0, 1)


async def _told(warm: asyncio.Task[Any]) -> str:
    with pytest.raises(ConnectionError) as caught:
        await warm
    return str(caught.value)


@pytest.mark.parametrize(
    "how", ["leaves", "leaves of all", "dies", "dies of all", "stays", "stays of all", "closes"]
)
def test_calls_that_fail_before_there_is_word_that_a_peer_is_gone(how: str) -> None:
    async def main() -> None:
        engine = Failing()
        pairs = pairing(engine, 0.01 if how.startswith("stays") else 30.0)
        warm = asyncio.create_task(pairs.warm_up(all_stay=how.endswith("all")))
        await engine.gave_up.wait()
        match how:
            case "leaves" | "leaves of all":
                pairs.drop(1, 1, True, "left")
                await warm
            case "dies":
                pairs.drop(1, 1, False, "its process ended")
                await warm
            case "dies of all":
                pairs.drop(1, 1, False, "its process ended")
                assert "no connection with rank 1" in await _told(warm)
            case "closes":
                await pairs.aclose()
                assert "no connection with rank 1" in await _told(warm)
            case _:
                assert "no connection with rank 1 (here, process 1): nobody listens" in await _told(warm)
        await pairs.aclose()

    asyncio.run(main())


def test_who_is_silent_is_called_once() -> None:
    calls = []

    async def silent(card: PeerCard, kind: str | None, step: Step) -> Stream:
        calls.append(card.rank)
        raise UnansweredError("no answer from tcp://10.0.0.1:7000")

    async def main() -> str:
        engine = Failing()
        pairs = Pairing(card(0), engine, silent, 30.0, 128, lambda *_: None)
        pairs.add(card(1))
        pairs.want(1)
        await engine.gave_up.wait()
        await pairs.aclose()
        return engine.failed[1]

    reason = asyncio.run(main())
    assert "no answer from tcp://10.0.0.1:7000 (AIOCOMM_HOST" in reason
    assert calls == [1]


def test_a_call_that_breaks_off_between_attaching_and_starting_leaves_the_pair_to_be_made() -> None:
    """The caller lives and gives up, too: whoever has something to say calls anew."""

    async def main() -> RecordingEngine:
        engine = RecordingEngine(links={"shm": ("unix", 0)})
        called = asyncio.Event()

        async def dial(card: PeerCard, kind: str | None, step: Step) -> Stream:
            called.set()
            raise ConnectionRefusedError("nobody listens")

        pairs = Pairing(card(0), engine, dial, 30.0, 128, lambda *_: None)
        pairs.add(card(1))
        tries = (messages.LinkTry("shm", 0, False, b""), messages.Attached("shm"))
        line = Line(OFFER, *tries, breaks_at=messages.Attached)
        with pytest.raises(ConnectionResetError, match="it broke"):
            await pairs.serve(cast("Stream", line))
        pairs.want(1)
        await asyncio.wait_for(called.wait(), LIMIT_S)
        await pairs.aclose()
        return engine

    engine = asyncio.run(main())
    assert engine.detached == [(1, "shm")]
    assert not engine.started


def test_what_is_missing_of_the_next_link_is_not_waited_for_without_end() -> None:
    """One has failed in the engine; a stream of the other is lost on its way."""

    async def main() -> Line:
        links = {"shm": ("unix", 0), "tcp": ("tcp", 1)}
        pairs = pairing(RecordingEngine(links, frozenset(["shm"])), 0.05, tuple(links))
        tries = (messages.LinkTry("shm", 0, False, b""), messages.Attached("shm"))
        line = Line(OFFER, *tries, messages.LinkTry("tcp", 1, False, b""))
        with pytest.raises(TimeoutError):
            await pairs.serve(cast("Stream", line))
        await pairs.aclose()
        return line

    told = asyncio.run(asyncio.wait_for(main(), LIMIT_S)).told
    assert [type(message).__name__ for message in told] == ["OfferAnswer", "LinkReady", "Unattached"]


def test_two_offers_of_one_name_end_as_others_do() -> None:
    async def main() -> None:
        pairs = pairing(RecordingEngine(), 30.0)
        lines = [Line(OFFER), Line(OFFER)]
        serving = []
        for line in lines:
            serving.append(asyncio.create_task(pairs.serve(cast("Stream", line))))
            await line.silent.wait()
        with pytest.raises(asyncio.CancelledError):  # the newer one replaces it
            await serving[0]
        lines[1].ends.set()
        with pytest.raises(ConnectionResetError, match="it has ended"):
            await serving[1]
        await pairs.aclose()

    asyncio.run(main())


def test_the_streams_of_a_link_are_opened_side_by_side_and_leave_room_for_other_peers() -> None:
    """Each of four peers may take an eighth of the places of a listener."""

    async def main() -> tuple[int, list[int]]:
        engine = RecordingEngine({"tcp": ("tcp", 9)})
        lines: list[Line] = []
        opening, most, full, waits = 0, 0, asyncio.Event(), asyncio.Event()

        async def dial(card: PeerCard, kind: str | None, step: Step) -> Stream:
            nonlocal opening, most
            if kind is None:
                lines.append(Line(messages.OfferAnswer("accept", "")))
                lines[0].silent = waits  # for the link to be ready
            else:
                opening += 1
                most = max(most, opening)
                if opening == 2:
                    full.set()
                await full.wait()  # for ever, one after the other
                opening -= 1
                lines.append(Line())
            return cast("Stream", lines[-1])

        pairs = Pairing(card(0, ("tcp",)), engine, dial, 30.0, 16, lambda *_: None)
        for rank in range(1, 5):
            pairs.add(card(rank, ("tcp",)))
        pairs.want(1)
        await waits.wait()
        await pairs.aclose()
        hellos = [told for line in lines[1:] for told in line.told if isinstance(told, messages.StreamHello)]
        return most, sorted(hello.index for hello in hellos)

    assert asyncio.run(asyncio.wait_for(main(), LIMIT_S)) == (2, list(range(9)))


@pytest.mark.parametrize("cancelled", [False, True], ids=["fails", "is cancelled"])
def test_a_stream_that_cannot_be_had_leaves_none_of_the_others(cancelled: bool) -> None:
    async def main() -> list[Line]:
        opened: list[Line] = []
        due = asyncio.Event()

        async def dial(card: PeerCard, kind: str | None, step: Step) -> Stream:
            if len(opened) == 2:
                due.set()
                if cancelled:
                    await asyncio.Event().wait()
                raise ConnectionRefusedError("nobody listens")
            opened.append(Line())
            return cast("Stream", opened[-1])

        streams: list[Stream] = []
        before = asyncio.all_tasks()
        opening = Opening(dial, card(1), b"a try", 4, lambda _: None).open("tcp", "tcp", 4, streams)
        task = asyncio.create_task(opening)
        await due.wait()
        if cancelled:
            task.cancel()
        with pytest.raises(asyncio.CancelledError if cancelled else ConnectionRefusedError):
            await task
        assert asyncio.all_tasks() == before
        assert streams == opened
        return opened

    assert len(asyncio.run(asyncio.wait_for(main(), LIMIT_S))) == 2


def test_each_step_of_a_caller_has_its_own_time() -> None:
    """Four fifths of the limit pass before each thing that it does."""

    class Talk(Line):
        def __init__(self) -> None:
            super().__init__()
            self.says: asyncio.Queue[messages.Message] = asyncio.Queue()

        async def receive(self) -> messages.Message:
            return await self.says.get()

        def take_over(self) -> Talk:
            return self

        def detach(self) -> int:
            return os.open(os.devnull, os.O_WRONLY)

    async def main() -> RecordingEngine:
        loop, passed_s = asyncio.get_running_loop(), 0.0
        time = loop.time
        loop.time = lambda: time() + passed_s  # type: ignore[method-assign]
        engine = RecordingEngine({"tcp": ("tcp", 3)})
        pairs = pairing(engine, limit_s := 1000.0, ("tcp",))

        async def does(line: Talk, message: messages.Message) -> asyncio.Task[None]:
            nonlocal passed_s
            if line not in lines:
                lines[line] = asyncio.create_task(pairs.serve(cast("Stream", line)))
            for _ in range(4):  # a process that stands still is not slow
                passed_s += limit_s / 5
                for _ in range(5):
                    await asyncio.sleep(0)
            line.says.put_nowait(message)
            return lines[line]

        lines: dict[Talk, asyncio.Task[None]] = {}
        call = Talk()
        await does(call, OFFER)
        await does(call, messages.LinkTry("tcp", 3, False, b""))
        for index in range(3):
            await (await does(Talk(), messages.StreamHello(OFFER.attempt, "tcp", index)))
        await (await does(call, messages.Attached("tcp")))
        await pairs.aclose()
        return engine

    engine = asyncio.run(main())
    assert engine.started == {1: "tcp"}
    engine.close()

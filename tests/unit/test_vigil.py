"""Who has lost the rendezvous calls its peers: who cannot be watched is lost, however late."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aiocomm._control.messages import PeerCard
from aiocomm._control.vigil import Vigil
from aiocomm.config import Settings
from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiocomm._control.limit import Step
    from aiocomm._control.stream import Stream

HEARTBEAT_S = 0.05


def card(rank: int) -> PeerCard:
    return PeerCard(rank, 1, None, "there", "there", 7, "", 1, (), ("tcp",), ("tcp://10.213.8.9:1",))


def told(
    error: Exception,
    reach_s: float = 0.0,
    handshake_timeout_s: float = 30.0,
    unwatched: Callable[[], list[PeerCard]] = lambda: [card(1)],
) -> tuple[object, ...]:
    """What a vigil has to say of a peer, whom nobody reaches within `reach_s`, or of itself."""

    async def dial(card: PeerCard, kind: str | None, step: Step, within_s: float | None) -> Stream:
        await asyncio.sleep(reach_s)
        raise error

    async def first() -> tuple[object, ...]:
        news: asyncio.Future[tuple[object, ...]] = asyncio.get_running_loop().create_future()

        def tell(*what: object) -> None:
            news.set_result(what)

        settings = Settings(heartbeat_s=HEARTBEAT_S, handshake_timeout_s=handshake_timeout_s)
        watching = Vigil(card(0), dial, settings, unwatched, lambda _: card(1), tell, tell)
        watching.begin()
        try:
            return await asyncio.wait_for(news, 30.0)
        finally:
            await watching.aclose()

    return asyncio.run(first())


def lost(reason: str) -> tuple[object, ...]:
    why = f"process 7 on there cannot be reached, and there is no rendezvous any more ({reason})"
    return 1, 1, False, why


@pytest.mark.parametrize(
    ("ends", "reason"),
    [(True, "Connection reset by peer"), (False, "no answer within 0.3 s while connecting with it")],
)
def test_who_has_taken_a_call_and_never_answers_is_lost(ends: bool, reason: str) -> None:
    """Its first failure comes once the time is over within which it had to be reached."""
    error = ConnectionResetError(104, "Connection reset by peer")
    assert told(error, 3 * HEARTBEAT_S if ends else 1000.0, 30.0 if ends else 0.1) == lost(reason)


@pytest.mark.parametrize("error", [UsageError("no address"), RuntimeError("unforeseen")], ids=repr)
def test_who_cannot_be_called_is_lost_whatever_the_reason(error: Exception) -> None:
    assert told(error) == lost(str(error))


def test_a_vigil_that_fails_says_so() -> None:
    def unwatched() -> list[PeerCard]:
        raise MemoryError("no room for a list")

    assert told(ConnectionRefusedError(), unwatched=unwatched) == (
        "deaths of peers would not be noticed any more (MemoryError('no room for a list'))",
    )

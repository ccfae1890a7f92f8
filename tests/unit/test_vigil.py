"""Peers that freeze as they are called by who has lost the rendezvous: they are lost, however late."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aiocomm._control.messages import PeerCard
from aiocomm._control.vigil import Vigil
from aiocomm.config import Settings

if TYPE_CHECKING:
    from aiocomm._control.stream import Stream

HEARTBEAT_S = 0.05


def card(rank: int) -> PeerCard:
    return PeerCard(rank, 1, None, "there", "there", 7, "", 1, (), ("tcp",), ("tcp://10.213.8.9:1",))


@pytest.mark.parametrize(
    ("ends", "reason"), [(True, "Connection reset by peer"), (False, "no answer for 0.3 s")]
)
def test_who_has_taken_a_call_and_never_answers_is_lost(ends: bool, reason: str) -> None:
    """Its first failure comes once the time is over within which it had to be reached."""

    async def dial(card: PeerCard, kind: str | None, reach_s: float | None) -> Stream:
        await asyncio.sleep(3 * HEARTBEAT_S if ends else 1000.0)
        raise ConnectionResetError(104, "Connection reset by peer")

    async def lost() -> tuple[int, int, bool, str]:
        told: asyncio.Future[tuple[int, int, bool, str]] = asyncio.get_running_loop().create_future()
        settings = Settings(heartbeat_s=HEARTBEAT_S, handshake_timeout_s=30.0 if ends else 0.1)
        watching = Vigil(
            card(0),
            dial,
            settings,
            lambda: [card(1)],
            lambda _: card(1),
            lambda *gone: told.set_result(gone),
        )
        watching.begin()
        try:
            return await asyncio.wait_for(told, 30.0)
        finally:
            await watching.aclose()

    rank, generation, graceful, why = asyncio.run(lost())
    assert (rank, generation, graceful) == (1, 1, False)
    assert why == f"process 7 on there cannot be reached, and there is no rendezvous any more ({reason})"

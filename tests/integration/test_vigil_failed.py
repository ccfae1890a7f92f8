"""A process that would not notice deaths any more takes all its peers for lost, and nobody waits for ever."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest
from harness import LIMIT_S, world

import aiocomm
from aiocomm._control.plane import ControlPlane

if TYPE_CHECKING:
    from aiocomm._control.messages import PeerCard

pytestmark = pytest.mark.anyio
WHY = r"deaths of peers would not be noticed any more \(MemoryError\('no room for a list'\)\)"


async def test_every_waiter_is_told_once_the_vigil_has_failed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unwatched, failing = ControlPlane._unwatched, set[ControlPlane]()

    def unforeseen(plane: ControlPlane) -> list[PeerCard]:
        if plane in failing:
            raise MemoryError("no room for a list")
        return unwatched(plane)

    monkeypatch.setattr(ControlPlane, "_unwatched", unforeseen)
    monkeypatch.setenv("AIOCOMM_HEARTBEAT_S", "0.02")

    async def wait(comm: aiocomm.Communicator, why: str) -> None:
        with pytest.raises(aiocomm.PeerLostError, match=why):
            await comm.recv(np.empty(1), src=3 - comm.rank, deadline=LIMIT_S)

    async with world(3, warmup=True) as (host, other, blind):
        failing.add(blind._plane)
        events = blind.events()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, blind, WHY)
            tasks.start_soon(wait, other, "has given this one up")
            await anyio.wait_all_tasks_blocked()
            await host.aclose()  # the rendezvous is gone, and the watch begins
        heard = {event.rank: event.reason for event in [await anext(events) for _ in range(2)]}
        assert heard[0] == "left"
        assert re.fullmatch(WHY, heard[other.rank])
        assert not blind.peers[other.rank].alive
        await wait(blind, WHY)  # whatever is begun later, too
    assert "the vigil failed unexpectedly" in caplog.text

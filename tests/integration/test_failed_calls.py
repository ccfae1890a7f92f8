"""Calls that have failed leave nothing behind: what others sent for them is not kept to be received."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from harness import all_call, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

TIMES = 20


def gather(comm: aiocomm.Communicator) -> Any:
    return comm.all_gather(np.empty((3, 4)), np.ones(4))


def dispatch(comm: aiocomm.Communicator) -> Any:
    return comm.dispatch(np.ones((2, 4)), [[0], [2]], experts=3)


@pytest.mark.parametrize("call", [gather, dispatch])
async def test_messages_of_failed_calls_are_dropped(call: Callable[[aiocomm.Communicator], Any]) -> None:
    async def gives_up(comm: aiocomm.Communicator) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, comm)
            await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()

    async def hears_of_it(comm: aiocomm.Communicator) -> None:
        with pytest.raises(aiocomm.TransferCancelled, match="rank 1 gave the call up"):
            await call(comm)

    async with world(3) as members:
        for _ in range(TIMES):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(hears_of_it, members[0])
                tasks.start_soon(gives_up, members[1])
            await hears_of_it(members[2])  # who was sent what the others had begun with
        await all_call(members, call)
        assert [one.statistics().unexpected_messages for one in members] == [0, 0, 0]
        assert [one.statistics().unexpected_bytes for one in members] == [0, 0, 0]

"""When memory of dispatch and combine is used again."""

from __future__ import annotations

from typing import Any

import pytest
from fakes.gpu import Stream
from gpu_experts import LINKS
from harness import world

from aiocomm.moe.memory import Pool

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.usefixtures("gpu", "images"),
    pytest.mark.parametrize("anyio_backend", ["asyncio"]),
]


async def test_what_was_lent_comes_back_once_all_have_ended_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(1, links=LINKS) as (comm,):
        pool = Pool(comm._engine, 0)
        back: list[Any] = []
        monkeypatch.setattr(pool, "give_back", back.append)
        blocks: list[Any] = ["first", "second", "third", "fourth"]
        for call, block in enumerate(blocks, 1):
            pool.lend(call, block, {1, 2})
        pool.heard(1, 3)
        pool.heard(2, 3, exactly=True)  # which may not have ended those before
        assert back == ["third"]
        pool.heard(2, 1)
        assert back == ["third", "first"]
        pool.heard_all([9, 9, 1], 0)
        assert back == ["third", "first"]
        pool.heard_all([0, 4, 2], 0)
        assert back == ["third", "first", "second"]
        pool.heard_all([0, 4, 4], 0)
        assert back == ["third", "first", "second", "fourth"]
        assert not pool.lent()


async def test_what_an_array_was_over_serves_calls_on_its_streams_only() -> None:
    """Others cannot ask those: they may be destroyed."""
    async with world(1, links=LINKS) as (comm,):
        pool = Pool(comm._engine, 0)
        one, other = Stream(device=0), Stream(device=0)
        mine, theirs = frozenset((one.handle,)), frozenset((other.handle,))
        block = pool.take(100, mine)
        pool.leave(block)
        pool.returned(block.address, mine)
        assert pool.take(100, theirs) is not block
        assert pool.take(100, mine | theirs) is block
        for stream in (one, other):
            stream.close()

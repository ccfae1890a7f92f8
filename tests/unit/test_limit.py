"""The time limit of exchanges in steps. Time passes when the test says so."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import pytest

from aiocomm._control.limit import StepLimit, StepTimeoutError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")
STEP_S = 4.0


class Clock:
    """The time of the running loop."""

    def __init__(self) -> None:
        self._now = 0.0
        loop = asyncio.get_running_loop()
        loop.time = lambda: self._now  # type: ignore[method-assign]

    async def passes(self, seconds: float) -> None:
        """Second by second, with all that is due then."""
        for _ in range(round(seconds)):
            self._now += 1.0
            await self.settles()

    async def stands_still(self, seconds: float) -> None:
        """The process does not run for so long."""
        self._now += seconds
        await self.settles()

    async def settles(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


def run(exchange: Callable[[StepLimit, Clock], Awaitable[T]]) -> T:
    async def main() -> T:
        clock = Clock()
        async with StepLimit(STEP_S, "waiting for a") as limit:
            return await exchange(limit, clock)

    return asyncio.run(main())


def test_each_step_has_its_own_time() -> None:
    async def exchange(limit: StepLimit, clock: Clock) -> None:
        for what in "bcd":
            await clock.passes(STEP_S - 1)
            limit.step(f"waiting for {what}")
        await clock.passes(STEP_S)

    with pytest.raises(StepTimeoutError, match="no answer within 4 s while waiting for d"):
        run(exchange)


def test_all_steps_together_have_an_end() -> None:
    made = 0

    async def exchange(limit: StepLimit, clock: Clock) -> None:
        nonlocal made
        while True:
            await clock.passes(1)
            limit.step("waiting for the next")
            made += 1

    with pytest.raises(StepTimeoutError, match="no answer within 48 s while waiting for the next"):
        run(exchange)
    assert made == 47


def test_what_has_come_while_this_process_stood_still_counts() -> None:
    async def exchange(limit: StepLimit, clock: Clock) -> str:
        news: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(1.0, news.set_result, "came")
        await clock.stands_still(1000.0)
        await clock.passes(STEP_S - 2)  # having stood still counts for a part
        return await news

    async def step_by_step(limit: StepLimit, clock: Clock) -> str:
        for _ in range(10):
            await clock.stands_still(1000.0)
            limit.step("waiting for more")
        return "came"

    assert run(exchange) == "came"
    assert run(step_by_step) == "came"


def test_a_step_as_the_time_ends_is_in_time() -> None:
    async def exchange(limit: StepLimit, clock: Clock) -> str:
        await clock.passes(STEP_S - 1)
        asyncio.get_running_loop().call_later(1.0, limit.step, "waiting for b")
        await clock.passes(STEP_S - 1)
        return "went on"

    assert run(exchange) == "went on"


def test_a_lifted_limit_begins_with_the_next_step() -> None:
    async def exchange(limit: StepLimit, clock: Clock) -> None:
        limit.lift()
        await clock.passes(10 * STEP_S)
        limit.step("waiting for b")
        await clock.passes(STEP_S)

    with pytest.raises(StepTimeoutError, match="no answer within 4 s while waiting for b"):
        run(exchange)


def test_steps_after_the_end_do_nothing() -> None:
    async def main() -> None:
        clock = Clock()
        for fails in (False, True):
            try:
                async with StepLimit(STEP_S, "waiting for a") as limit:
                    await clock.passes(STEP_S if fails else 1)
            except StepTimeoutError:
                limit.step("waiting for b")
            limit.step("waiting for c")
            await clock.passes(2 * STEP_S)
            assert limit.what == "waiting for a"

    asyncio.run(main())

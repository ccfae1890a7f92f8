"""The time limit of an exchange: each step of it has so long, and begins the time anew.

Many peers at once, or a process that computes and holds its GIL, make an exchange slow and every step of it
late; that is worth waiting for. Who makes no step is given up, with the name of the step that did not come.

Rules:
1. A step is a whole message or connection, and never a part: who sends byte by byte makes none.
2. All steps together have `_MOST` times as long as one, whatever is said: nobody holds a place for ever.
3. Time in which this process does not run is nobody's fault. It is waited for in parts, and one that ends
   late, however late, counts once: what has come meanwhile is read before the next one ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Step", "StepLimit", "StepTimeoutError"]

_PARTS: Final = 4
_MOST: Final = 12

Step: TypeAlias = Callable[[str], None]
"""Told what is waited for from now on; what was waited for before has come."""


class StepTimeoutError(TimeoutError):
    """A step did not come in time; the message says which."""


class StepLimit:
    """Limits the time of what runs in its block: `async with StepLimit(5.0, "waiting for …") as limit`.

    Args:
        step_s: seconds that each step may take.
        what: is waited for first.

    Raises (from the block):
        StepTimeoutError: a step, or all of them, took longer.
    """

    def __init__(self, step_s: float, what: str) -> None:
        self.what = what
        """What is waited for."""
        self._part_s = step_s / _PARTS
        self._parts = _PARTS
        self._all_parts = _MOST * _PARTS
        self._limit = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    async def __aenter__(self) -> StepLimit:
        await self._limit.__aenter__()
        self.step(self.what)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lift()
        self._ended = True
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError:
            limit_s = self._part_s * (_PARTS if self._all_parts else _MOST * _PARTS)
            raise StepTimeoutError(f"no answer within {limit_s:g} s while {self.what}") from error

    def step(self, what: str) -> None:
        """A step is made; from now on `what` is waited for."""
        self.lift()
        if not self._ended:
            self.what = what
            self._parts = _PARTS
            self._wait()

    def lift(self) -> None:
        """What comes next may take any time, until there is another step."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._ended and not self._limit.expired():
            self._limit.reschedule(None)

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._part_s, self._part_is_over)

    def _part_is_over(self) -> None:
        self._parts -= 1
        self._all_parts -= 1
        if self._parts and self._all_parts:
            self._wait()
        else:
            self._limit.reschedule(asyncio.get_running_loop().time())

"""Running a program's main coroutine on a loop that may spin on completions before it sleeps."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from aiocomm._loop.spin import SpinSelector
from aiocomm.errors import UsageError, UsageTypeError

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["run"]

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, spin: float = 0.0, debug: bool | None = None) -> T:
    """Run a coroutine as `asyncio.run` does.

    Args:
        main: the program.
        spin: seconds for which the loop polls for completions before it sleeps. 50e-6 halves the latency of
            small messages and more; it costs a core while messages flow and for `spin` after the last one, or
            up to 4 times that where answers come a little later.
        debug: asyncio's debug mode.

    Raises:
        UsageError: `main` is no coroutine, `spin` is negative or longer than a second, or a loop runs in this
            thread already, as in a notebook: await the coroutine there.
    """
    given: object = main
    if not asyncio.iscoroutine(given):
        hint = ": call it, run(main())" if callable(given) else ""
        raise UsageTypeError(f"main={given!r} is no coroutine{hint}")
    if not 0 <= spin <= 1:
        main.close()
        raise UsageError(f"spin={spin!r}: seconds, 0 to 1")
    if asyncio._get_running_loop() is not None:
        main.close()
        raise UsageError("a loop runs in this thread already, as in a notebook: write `await main()`")
    if spin == 0:
        return asyncio.run(main, debug=debug)

    def loop() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(SpinSelector(spin))

    with asyncio.Runner(debug=debug, loop_factory=loop) as runner:
        return runner.run(main)

"""The process that `aiocomm.spawn` starts: `python -m aiocomm._worker`."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any

import cloudpickle

from aiocomm._process import JOINED, die_with_parent
from aiocomm.config import take_worker
from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]


def main() -> int:
    """Load the worker function, run it, report how it failed; returns the exit status."""
    payload, outcome, parent = take_worker()
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells the whole group; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))  # blocked by `spawn`, for the imports above
    try:
        sys.path[:], work = cloudpickle.loads(_read(payload))
        os.close(payload)
        worker, arguments, library = cloudpickle.loads(work)  # imports what lies there
        _run(worker, arguments, library, lambda: os.pwrite(outcome, JOINED, 0))
    except BaseException as error:
        os.pwrite(outcome, _report(error), len(JOINED))
        return 1
    return 0


def _run(
    worker: Callable[..., Any], arguments: tuple[Any, ...], library: str, joined: Callable[[], object]
) -> None:
    import aiocomm

    async def work() -> None:
        async with aiocomm.connect() as comm:
            joined()
            result = worker(comm, *arguments)
            if not inspect.isawaitable(result):
                raise UsageError(
                    f"the worker must be a coroutine function: it returned {type(result).__name__}, "
                    "which cannot be awaited"
                )
            await result

    if library == "trio":
        import trio

        trio.run(work)
    else:
        aiocomm.run(work())


def _read(descriptor: int) -> bytes:
    # By offset: the position of the descriptor is shared with the other workers.
    size = os.fstat(descriptor).st_size
    content = bytearray()
    while len(content) < size:
        content += os.pread(descriptor, size - len(content), len(content))
    return bytes(content)


def _report(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        pickled = cloudpickle.dumps(error)
    except Exception:
        pickled = None
    return bytes(cloudpickle.dumps((text, pickled)))


if __name__ == "__main__":
    sys.exit(main())

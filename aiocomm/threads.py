"""Blocking twins of a communicator's operations, for threads other than its loop's."""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, Any, Final

from aiocomm.errors import ClosedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiocomm._loop.backend import Backend
    from aiocomm.communicator import Communicator
    from aiocomm.region import RemoteRegion
    from aiocomm.types import Status

__all__ = ["ThreadedCommunicator"]

_LOOK_S: Final = 0.2  # after which it is looked whether the loop has ended


class ThreadedCommunicator:
    """`comm.from_thread`: each call blocks its thread until the operation has ended, and returns its result.

    The loop must be running: it submits the operation. Arguments and errors are those of the communicator's
    method; `ClosedError` also if the loop has ended, or ends meanwhile.
    """

    def __init__(self, comm: Communicator, backend: Backend) -> None:
        self._comm = comm
        self._backend = backend

    def send(self, array: Any, dst: int, **options: Any) -> None:
        """`Communicator.send`, blocking."""
        self._run(lambda: self._comm.send(array, dst, **options))

    def recv(self, out: Any, src: int = -1, **options: Any) -> Status:
        """`Communicator.recv`, blocking."""
        status: Status = self._run(lambda: self._comm.recv(out, src, **options))
        return status

    def recv_array(self, src: int = -1, **options: Any) -> Any:
        """`Communicator.recv_array`, blocking."""
        return self._run(lambda: self._comm.recv_array(src, **options))

    def put(self, array: Any, remote: RemoteRegion, **options: Any) -> None:
        """`Communicator.put`, blocking."""
        self._run(lambda: self._comm.put(array, remote, **options))

    def get(self, remote: RemoteRegion, into: Any, **options: Any) -> None:
        """`Communicator.get`, blocking."""
        self._run(lambda: self._comm.get(remote, into, **options))

    def _run(self, submit: Callable[[], Any]) -> Any:
        if self._backend.running_here():
            raise UsageError(
                "from_thread would block its own event loop: await the communicator's method instead"
            )
        if self._comm.closed:
            raise ClosedError("the communicator was closed")
        outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def ended(transfer: Any) -> None:
            if transfer.cancelled():
                outcome.cancel()
            elif (error := transfer.exception()) is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(transfer.result())

        def start() -> None:
            try:
                submit().add_done_callback(ended)
            except BaseException as error:
                outcome.set_exception(error)

        submitted = self._backend.call_threadsafe(start)
        while submitted and not outcome.done():
            try:
                return outcome.result(_LOOK_S)
            except TimeoutError:  # or the operation's own error
                submitted = not self._backend.has_ended()  # which nothing here is told of
        if not outcome.done():
            raise ClosedError(
                "the event loop of the communicator has ended, and with it all that would end this operation"
            )
        return outcome.result()

"""Blocking twins of a communicator's operations, for threads other than its loop's."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm._device import describe
from aiocomm._streams import LEGACY, NO_STREAM, PER_THREAD
from aiocomm.errors import ClosedError, TransferCancelled, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiocomm._loop.backend import Backend
    from aiocomm.communicator import Communicator
    from aiocomm.region import RemoteRegion
    from aiocomm.types import Status
    from aiocomm_native import Transfer

__all__ = ["ThreadedCommunicator"]

_LOOK_S: Final = 0.2  # after which it is looked whether the loop has ended


class ThreadedCommunicator:
    """`comm.from_thread`: each call blocks its thread until the operation has ended, and returns its result.

    The loop must be running: it submits the operation. Arguments and errors are those of the communicator's
    method: also those that its transfer ends with, such as `PeerLostError` and `DeadlineExceeded`. Besides:

    - `ClosedError` also if the loop has ended, or ends meanwhile.
    - `TransferCancelled` also if this side cancels it.
    - `UsageError`: this is the loop's own thread, which the call would block.
    - A GPU array's stream, unless `stream=` names another, is the one that is current in the calling thread.
    - `deadline=` counts from when the loop submits it, so one that is stuck is waited for.
    - An exception that interrupts the call, such as `KeyboardInterrupt`, cancels the operation, and comes out
      once nothing touches the buffer any more.
    """

    def __init__(self, comm: Communicator, backend: Backend) -> None:
        self._comm = comm
        self._backend = backend

    def send(self, array: Any, dst: int, **options: Any) -> None:
        """`Communicator.send`, blocking. Errors and interrupts: see the class."""
        options = _of_this_thread(array, False, options)
        self._run(lambda: self._comm.send(array, dst, **options))

    def recv(self, out: Any, src: int = -1, **options: Any) -> Status:
        """`Communicator.recv`, blocking. Errors and interrupts: see the class."""
        options = _of_this_thread(out, True, options)
        status: Status = self._run(lambda: self._comm.recv(out, src, **options))
        return status

    def recv_array(self, src: int = -1, **options: Any) -> Any:
        """`Communicator.recv_array`, blocking. Errors and interrupts: see the class."""
        return self._run(lambda: self._comm.recv_array(src, **options))

    def put(self, array: Any, remote: RemoteRegion, **options: Any) -> None:
        """`Communicator.put`, blocking. Errors and interrupts: see the class."""
        options = _of_this_thread(array, False, options)
        self._run(lambda: self._comm.put(array, remote, **options))

    def get(self, remote: RemoteRegion, into: Any, **options: Any) -> None:
        """`Communicator.get`, blocking. Errors and interrupts: see the class."""
        options = _of_this_thread(into, True, options)
        self._run(lambda: self._comm.get(remote, into, **options))

    def _run(self, submit: Callable[[], Any]) -> Any:
        if self._backend.running_here():
            raise UsageError(
                "from_thread would block its own event loop: await the communicator's method instead"
            )
        if self._comm._forked:
            self._comm._refuse()
        if self._comm.closed:
            raise ClosedError("the communicator was closed")
        outcome = _Outcome()
        submitted: list[Transfer[Any]] = []

        def ended(transfer: Transfer[Any]) -> None:
            if transfer.cancelled():
                outcome.tell(_cancelled(transfer))
            elif (error := transfer.exception()) is not None:
                outcome.tell(error)
            else:
                outcome.tell(None, transfer.result())

        def start() -> None:
            if outcome.told:
                return  # given up before
            try:
                submitted.append(submit())
                submitted[0].add_done_callback(ended)
            except BaseException as error:
                outcome.tell(error)

        def stop() -> None:
            if submitted:
                submitted[0].cancel()
            elif not outcome.told:
                outcome.tell(None)

        try:
            has_ended = self._wait(outcome, self._backend.call_threadsafe(start))
        except BaseException:  # an interrupt: once it has left the call, the memory is the caller's again
            self._wait(outcome, self._backend.call_threadsafe(stop))
            raise
        if not has_ended:
            raise ClosedError(
                "the event loop of the communicator has ended, and with it all that would end this operation"
            )
        if outcome.error is not None:
            raise outcome.error
        return outcome.result

    def _wait(self, outcome: _Outcome, is_called: bool) -> bool:
        """Wait for the operation's end. False: there is none to come."""
        while is_called and not outcome.told:
            if not outcome.news.acquire(timeout=_LOOK_S):
                is_called = not self._backend.has_ended()  # which nothing here is told of
        return outcome.told


class _Outcome:
    """What the loop tells the thread that waits, once.

    An interrupt of that thread, at whatever step, leaves nothing behind that the loop would wait for: in a
    `concurrent.futures.Future` it could leave a lock taken.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.result: Any = None
        self.told = False
        self.news = threading.Lock()  # free once it is told
        self.news.acquire()

    def tell(self, error: BaseException | None, result: Any = None) -> None:
        """Called by the loop's thread."""
        self.error, self.result, self.told = error, result, True
        self.news.release()


def _of_this_thread(array: Any, writable: bool, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the stream that they mean here: the loop's thread has current streams of its own."""
    stream = options.get("stream")
    if stream is None and isinstance(array, np.ndarray | bytes | bytearray | memoryview):
        return options
    described = describe(array, writable, stream)
    if described is None or (handle := described[4]) == NO_STREAM:
        return options
    # No other thread can name the per-thread one, but the legacy one waits for it.
    return options | {"stream": LEGACY if handle == PER_THREAD else handle}


def _cancelled(transfer: Transfer[Any]) -> TransferCancelled:
    peer = transfer.peer if transfer.peer >= 0 else None
    return TransferCancelled(f"{transfer.kind} of {transfer.nbytes} bytes: cancelled by this side", peer)

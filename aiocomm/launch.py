"""`spawn`: a world of this process and a few workers, for notebooks, tests and scripts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import io
import os
import signal
import subprocess
import sys
from collections import ChainMap
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar, Final

import anyio
import cloudpickle

from aiocomm._loop.backend import in_trio
from aiocomm._numbers import number
from aiocomm._process import JOINED, fresh_address, fresh_token
from aiocomm.config import child_environment
from aiocomm.connecting import connect, joining_s, names_of_links
from aiocomm.errors import AiocommError, PeerError, PeerLostError, UsageError, UsageTypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from aiocomm.communicator import Communicator

__all__ = ["Spawn", "WorkerError", "spawn"]

_READY_S: Final = 60.0


class WorkerError(AiocommError):
    """A worker of `spawn` failed. The message ends with its traceback; its exception is the cause, if it
    could travel.

    `rank` is the worker's, `exit_code` its process's (negative: the signal that ended it).
    """

    def __init__(self, message: str, rank: int = -1, exit_code: int = 0) -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code


@dataclass(eq=False)
class _Worker:
    """One started process. `outcome` is shared memory into which it writes that it has joined, and why it
    failed.
    """

    rank: int
    process: subprocess.Popen[bytes]
    pidfd: int
    outcome: int
    stopped: bool = False

    def has_joined(self) -> bool:
        """Whether it is, or was, in the world."""
        return os.pread(self.outcome, len(JOINED), 0) == JOINED

    def error(self) -> WorkerError | None:
        """What went wrong in it, unless it was stopped from here."""
        code = self.process.returncode
        if self.stopped and code is not None and code < 0:
            return None
        report = os.pread(self.outcome, os.fstat(self.outcome).st_size, len(JOINED))
        if not report and code == 0:
            return None
        if not report:
            how = f"was ended by signal {-code}" if code < 0 else f"exited with status {code}"
            return WorkerError(f"the worker with rank {self.rank} {how}", self.rank, code)
        text, pickled = cloudpickle.loads(report)
        # Where this process ignores the ends of children, the kernel keeps no status.
        error = WorkerError(f"the worker with rank {self.rank} failed:\n\n{text}", self.rank, code or 1)
        if pickled is not None:
            with contextlib.suppress(Exception):  # its class may not exist here; the text says enough
                error.__cause__ = cloudpickle.loads(pickled)
        return error

    def close(self) -> None:
        """Release what is held for it."""
        os.close(self.pidfd)
        os.close(self.outcome)


class Spawn:
    """The world that `spawn` describes; entering it starts the workers and connects."""

    def __init__(
        self,
        worker: Callable[..., Any],
        arguments: tuple[Any, ...],
        n: int,
        options: dict[str, Any],
        deadline: float,
        grace_s: float,
    ) -> None:
        self._worker = worker
        self._arguments = arguments
        self._n = n
        self._options = options
        self._deadline = deadline
        self._grace_s = grace_s
        self._workers: list[_Worker] = []
        self._communicator: Communicator | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(
                f"there is no {name!r} yet: spawn() is to be entered (async with aiocomm.spawn(…) as comm)"
            )

    async def __aenter__(self) -> Communicator:
        address, token = fresh_address(), fresh_token()
        try:
            self._start(address, token)
            trouble: Exception | None = None
            async with anyio.create_task_group() as group:
                group.start_soon(self._watch_start, group.cancel_scope)
                try:
                    opened = connect(
                        address,
                        rank=0,
                        size=self._n + 1,
                        token=token,
                        deadline=self._deadline,
                        **self._options,
                    )
                    self._communicator = await opened
                except Exception as error:  # kept, since a task group would wrap it
                    trouble = error
                group.cancel_scope.cancel()
            if self._communicator is None:
                self._raise(self._failures(), trouble)
                raise trouble or WorkerError("a worker ended before it had joined", -1, 0)
        except BaseException:
            await self._stop()
            raise
        return self._communicator

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unawaited: list[AiocommError] = []
        try:
            if error is None:
                await self._wait_all_or_failure()
            elif isinstance(error, PeerError):
                with anyio.move_on_after(self._grace_s):
                    await self._wait_any()  # it was lost because it ends, and is about to say why
            failures = self._failures()
        finally:
            unawaited = await self._stop(drain=error is None)
        if error is None:
            self._raise(_explained(failures, unawaited))
        elif failures and isinstance(error, PeerError):
            self._raise(failures, error)  # the peer's own report says why it was lost
        elif isinstance(error, Exception):
            for failure in failures:
                error.add_note(str(failure))

    def _start(self, address: str, token: str) -> None:
        payload = os.memfd_create("aiocomm-payload", os.MFD_CLOEXEC)
        try:
            _write_all(payload, _pickled((sys.path, self._pickled_work())))
            # Workers start with SIGINT blocked, until they ignore it: a Ctrl-C within their imports is ours.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
            try:
                for rank in range(1, self._n + 1):
                    self._start_one(rank, payload, address, token)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        finally:
            os.close(payload)

    def _pickled_work(self) -> bytes:
        function = inspect.unwrap(self._worker)
        while isinstance(function, functools.partial):
            function = function.func
        try:
            with _by_value(getattr(function, "__module__", None) or ""):
                return _pickled((self._worker, self._arguments, _library()))
        except AiocommError:
            raise
        except Exception as error:  # as many kinds as there are classes that refuse
            raise UsageTypeError(
                "the worker, its arguments or what it refers to cannot be sent to another process "
                f"({error}): have the worker make it, or pass what it is made of"
            ) from error

    def _start_one(self, rank: int, payload: int, address: str, token: str) -> None:
        outcome = os.memfd_create("aiocomm-outcome", os.MFD_CLOEXEC)
        try:
            variables = {
                "AIOCOMM_RANK": str(rank),
                "AIOCOMM_SIZE": str(self._n + 1),
                "AIOCOMM_LOCAL_RANK": str(rank),
                "AIOCOMM_ADDRESS": address,
                "AIOCOMM_TOKEN": token,
                "AIOCOMM_TIMEOUT_S": str(self._deadline),
                "AIOCOMM_WORKER": f"{payload} {outcome} {os.getpid()}",
            }
            links = self._options.get("links")
            if links is not None:
                variables["AIOCOMM_LINKS"] = ",".join(links)
            process = subprocess.Popen(
                # -P: what lies in the working folder is not the worker's to import before it knows our path.
                [sys.executable, "-P", "-m", "aiocomm._worker"],
                env=child_environment(variables),
                stdin=subprocess.DEVNULL,
                pass_fds=(payload, outcome),
            )
            try:
                pidfd = os.pidfd_open(process.pid)
            except BaseException:  # no descriptors are left: nobody would end it
                process.kill()
                process.wait()
                raise
            self._workers.append(_Worker(rank, process, pidfd, outcome))
        except BaseException:
            os.close(outcome)
            raise

    async def _watch_start(self, scope: anyio.CancelScope) -> None:
        """Give up connecting once a worker has failed, or ended without joining: the world would never be
        complete. One whose work is done may have ended before this process was told that all had come.
        """

        def look(worker: _Worker, _: anyio.CancelScope) -> None:
            if worker.process.poll() or not worker.has_joined():
                scope.cancel()

        await self._as_they_end(look)

    async def _wait_any(self) -> None:
        await self._as_they_end(lambda _, waiting: waiting.cancel())

    async def _as_they_end(self, told: Callable[[_Worker, anyio.CancelScope], None]) -> None:
        """Wait for the workers; `told` of each that has ended, and of the wait, which it may cut short."""
        async with anyio.create_task_group() as group:

            async def wait(worker: _Worker) -> None:
                await _readable(worker.pidfd)
                told(worker, group.cancel_scope)

            for worker in self._workers:
                group.start_soon(wait, worker)

    async def _wait_all(self) -> None:
        for worker in self._workers:
            await _readable(worker.pidfd)

    async def _wait_all_or_failure(self) -> None:
        """Wait for the workers; once one has failed, not much longer for the others, which may need it."""

        def look(worker: _Worker, waiting: anyio.CancelScope) -> None:
            if worker.process.poll():
                waiting.deadline = min(waiting.deadline, anyio.current_time() + self._grace_s)

        await self._as_they_end(look)

    def _failures(self) -> list[AiocommError]:
        """What went wrong in the workers that have ended."""
        ended = [worker for worker in self._workers if worker.process.poll() is not None]
        return [error for worker in ended if (error := worker.error()) is not None]

    def _raise(self, failures: list[AiocommError], cause: BaseException | None = None) -> None:
        workers = [error for error in failures if isinstance(error, WorkerError)]
        if len(failures) == len(workers) == 1:
            raise failures[0] from (failures[0].__cause__ or cause)
        if len(failures) > len(workers):
            what = "transfers failed and nobody awaited them"
            raise ExceptionGroup(f"workers failed, and {what}" if workers else what, failures) from cause
        if failures:
            raise ExceptionGroup("several workers failed", failures) from cause

    async def _stop(self, drain: bool = False) -> list[AiocommError]:
        """End the workers that still run, and close the communicator, whatever happens meanwhile.

        Returns errors of transfers that nobody awaited.
        """
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.stopped = True
                if self._communicator is not None:
                    self._communicator._log.ends(worker.rank)
                worker.process.terminate()
        with anyio.CancelScope(shield=True):
            try:
                comm = self._communicator
                if comm is not None:
                    await comm._close(drain)
            finally:
                self._communicator = None
                with anyio.move_on_after(self._grace_s):
                    await self._wait_all()
                for worker in self._workers:
                    if worker.process.poll() is None:
                        worker.process.kill()
                    worker.process.wait()
                    worker.close()
                self._workers.clear()
        return [] if comm is None else comm._unawaited()


def spawn(
    worker: Callable[..., Any],
    n: int = 1,
    *args: Any,
    links: str | Sequence[str] | None = None,
    warmup: bool = False,
    deadline: float = _READY_S,
    grace_s: float = 5.0,
) -> Spawn:
    """A world of this process (rank 0) and `n` others that run `worker(comm, *args)`.

    `async with spawn(worker, n=3) as comm:` gives this process's communicator. The end of the block waits for
    the workers; if the block fails they are terminated. A failed worker is raised there as `WorkerError`,
    several as an `ExceptionGroup`, as are transfers that failed and that nobody awaited. Works under asyncio
    and trio; the workers run on the same kind of loop.

    Args:
        worker: coroutine function, also one defined in a notebook; takes the worker's communicator.
        n: number of other processes.
        args: further arguments of `worker`; sent by cloudpickle.
        links: links that may be used, best first.
        warmup: as for `connect`.
        deadline: seconds within which all must have joined.
        grace_s: seconds that a worker which is asked to end may take before it is killed.

    Raises:
        UsageError: `n` is less than 1, `grace_s` is negative, `worker` is a function without `async`, an
            option makes no sense, or what is to travel cannot (upon entering).

    A partial, a lambda or an object with `__call__` is taken, and fails in the worker if what it returns
    cannot be awaited.

    Cancellation while entering or leaving terminates the workers and leaves no process behind.
    """
    n = number("n", n)
    if n < 1:
        raise UsageError(f"cannot spawn {n} workers")
    if not grace_s >= 0:  # also catches NaN
        raise UsageError(f"grace_s must not be negative, but is {grace_s}")
    if not callable(worker):
        raise UsageError(f"the worker must be a coroutine function, not {type(worker).__name__}")
    if _is_plain(worker):
        raise UsageError(f"the worker must be a coroutine function (async def), and {worker.__name__} is not")
    options = {"links": names_of_links(links), "warmup": warmup}
    return Spawn(worker, args, n, options, joining_s(deadline) or _READY_S, grace_s)


def _explained(failures: list[AiocommError], unawaited: list[AiocommError]) -> list[AiocommError]:
    """What to raise. Transfers with workers that failed, or were stopped for that, are notes of the error."""
    by_rank = {error.rank: error for error in failures if isinstance(error, WorkerError)}
    left = []
    for error in unawaited:
        if failures and isinstance(error, PeerLostError):
            told = by_rank.get(-1 if error.peer is None else error.peer, failures[0])
            told.add_note(f"nobody awaited this transfer: {error}")
        else:
            left.append(error)
    return [*failures, *left]


def _is_plain(worker: Callable[..., Any]) -> bool:
    """Whether this is a function without `async`, and does not wrap one with it."""
    function = inspect.unwrap(worker)
    if not (inspect.isfunction(function) or inspect.ismethod(function)) or function.__name__ == "<lambda>":
        return False
    return not (inspect.iscoroutinefunction(worker) or inspect.iscoroutinefunction(function))


@contextlib.contextmanager
def _by_value(name: str) -> Iterator[None]:
    """Have a module's functions and classes travel themselves where a worker could not import them."""
    module = sys.modules.get(name)
    known = {"__main__", *cloudpickle.list_registry_pickle_by_value()}
    if module is None or module.__name__ != name or name in known or _is_found(name):
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def _is_found(name: str) -> bool:
    """Whether a fresh process with our path can import a module. Some of pytest's (`importlib`) it cannot."""
    path: Sequence[str] | None = None
    for end in (*(index for index, letter in enumerate(name) if letter == "."), len(name)):
        finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
        found = (finder.find_spec(name[:end], path) for finder in finders)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


def _library() -> str:
    """The loop that runs here: "trio" or "asyncio"."""
    return "trio" if in_trio() else "asyncio"


async def _readable(descriptor: int) -> None:
    """Wait until a descriptor is readable, on whichever loop runs."""
    if _library() == "trio":
        import trio

        await trio.lowlevel.wait_readable(descriptor)
        return
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def note() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, note)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


def _code(code: CodeType) -> tuple[Any, tuple[Any, ...]]:
    make, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return make, tuple(code.co_filename if one == "<dynamic-code>" else one for one in arguments)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Functions travel with the names of their files, which cloudpickle leaves out: tracebacks show lines."""

    dispatch_table: ClassVar = ChainMap({CodeType: _code}, cloudpickle.Pickler.dispatch_table)


def _pickled(what: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(what)
    return file.getvalue()


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]

"""`aiocomm.spawn`: worlds made in a `with` block, and everything that can go wrong in their workers."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import functools
import gc
import importlib.util
import os
import pickle
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import pytest
import trio
from harness import until

import aiocomm
from aiocomm._control.client import Client
from aiocomm._process import fresh_address, fresh_token
from aiocomm.launch import WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator


PATIENCE_S = 60.0


def on_uvloop(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


LOOPS = {
    "asyncio": lambda main: asyncio.run(main()),
    "uvloop": on_uvloop,
    "trio": trio.run,
}


@pytest.fixture(params=LOOPS)
def on_loop(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], None]:
    """Runs a coroutine function on the loop in question."""
    return LOOPS[request.param]  # type: ignore[no-any-return]


@pytest.fixture(scope="module", autouse=True)
def _uvloop_has_its_own_pipe() -> None:
    """uvloop opens a pipe for signals once per process, and keeps it."""

    async def main() -> None:
        pass

    on_uvloop(main)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    yield
    for thread in threading.enumerate():
        if thread.name == "aiocomm-control":  # a connect that failed closes in the background
            thread.join(30.0)
    gc.collect()  # tracebacks of the expected errors hold communicators
    left = {thread for thread in threading.enumerate() if not thread.name.startswith(("Trio", "asyncio"))}
    assert left <= threads
    assert set(os.listdir("/proc/self/fd")) <= descriptors
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_workers_talk_with_this_process(on_loop: Callable[[Any], None]) -> None:
    async def worker(comm: Any, factor: float) -> None:
        x = await comm.recv_array(src=0, tag=1)
        await comm.send(x * factor, dst=0, tag=2)

    async def main() -> None:
        async with aiocomm.spawn(worker, 2, 3.0) as comm:
            assert (comm.rank, comm.size) == (0, 3)
            for rank in (1, 2):
                await comm.send(np.arange(4.0), dst=rank, tag=1)
                assert (await comm.recv_array(src=rank, tag=2)).tolist() == [0.0, 3.0, 6.0, 9.0]

    on_loop(main)


def test_a_failed_worker_is_raised_with_its_traceback(on_loop: Callable[[Any], None]) -> None:
    async def worker(comm: Any) -> None:
        if comm.rank == 2:
            raise KeyError("what was missing")

    async def main() -> None:
        async with aiocomm.spawn(worker, 2):
            pass

    with pytest.raises(WorkerError, match="rank 2 failed") as caught:
        on_loop(main)
    assert "what was missing" in str(caught.value)
    assert f'File "{__file__}", line' in str(caught.value)
    assert "in worker" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    assert (caught.value.rank, caught.value.exit_code) == (2, 1)


def test_a_worker_may_lie_in_a_module_beside_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_the_program.py").write_text(
        """
class Request:
    def __init__(self, prompt):
        self.prompt = prompt

async def answer(comm, request):
    await comm.send(request.prompt.upper(), 0)
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    beside = importlib.import_module("beside_the_program")

    async def main() -> None:
        async with aiocomm.spawn(beside.answer, 1, beside.Request(b"a prompt")) as comm:
            assert (await comm.recv_array(1)).tobytes() == b"A PROMPT"

    asyncio.run(main())


def test_the_error_of_a_failed_worker_travels() -> None:
    error = aiocomm.WorkerError("it failed", 2, -9)
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.rank, copied.exit_code) == ("it failed", 2, -9)


async def _fails(comm: Any) -> None:
    raise ValueError("it cannot")


def test_a_worker_that_fails_is_noticed_also_where_ends_of_children_are_ignored() -> None:
    async def main() -> None:
        async with aiocomm.spawn(_fails, n=1):
            pass

    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(WorkerError, match="ValueError: it cannot") as caught:
            asyncio.run(main())
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert caught.value.exit_code == 1


async def _refers_to(other: object, comm: Any) -> None:
    pass


def test_a_worker_that_refers_to_a_communicator_is_refused(on_loop: Callable[[Any], None]) -> None:
    async def main() -> None:
        async with aiocomm.connect(size=1) as comm:
            channel = comm.channel("urgent")
            async with comm.register(bytearray(1)) as region:
                for mine in (comm, channel, region, comm.remote(region.handle)):
                    with pytest.raises(TypeError, match="what belongs to it, stays in its process"):
                        async with aiocomm.spawn(functools.partial(_refers_to, mine)):
                            pass

    on_loop(main)


def test_several_failed_workers_are_a_group() -> None:
    async def worker(comm: Any) -> None:
        raise ValueError(comm.rank)

    async def main() -> None:
        async with aiocomm.spawn(worker, 3, grace_s=PATIENCE_S):
            pass

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(main())
    assert sorted(error.__cause__.args for error in caught.value.exceptions) == [(1,), (2,), (3,)]  # type: ignore[union-attr]


async def _unawaited(comm: aiocomm.Communicator) -> None:
    """Let a transfer fail that nobody looks at."""
    comm.recv(bytearray(1), 0, tag=9)
    await comm.send(b"too long", 0, tag=9)


def test_transfers_that_nobody_awaited_are_raised(on_loop: Callable[[Any], None]) -> None:
    async def worker(comm: Any) -> None:
        pass

    async def main() -> None:
        async with aiocomm.spawn(worker, 1) as comm:
            with contextlib.suppress(aiocomm.TruncationError):
                await _unawaited(comm)

    with pytest.raises(ExceptionGroup, match="transfers failed and nobody awaited them") as caught:
        on_loop(main)
    assert [type(error) for error in caught.value.exceptions] == [aiocomm.TruncationError]


def test_workers_and_transfers_that_failed_are_both_raised(on_loop: Callable[[Any], None]) -> None:
    async def worker(comm: Any) -> None:
        raise ValueError("the worker's")

    async def main() -> None:
        async with aiocomm.spawn(worker, 1) as comm:
            with contextlib.suppress(aiocomm.TruncationError):
                await _unawaited(comm)

    with pytest.raises(ExceptionGroup, match="workers failed, and transfers") as caught:
        on_loop(main)
    assert [type(error) for error in caught.value.exceptions] == [WorkerError, aiocomm.TruncationError]


def test_transfers_that_were_lost_with_a_worker_are_notes_of_its_error(
    on_loop: Callable[[Any], None],
) -> None:
    """Also one with a worker that is stopped for that, if its end is seen before this one's."""

    async def worker(comm: Any) -> None:
        if comm.rank == 2:
            signal.pause()
        raise ValueError("the worker's")

    async def main() -> None:
        async with aiocomm.spawn(worker, 2, grace_s=0.2) as comm:
            lost = comm.recv(bytearray(1), 1, tag=9)
            comm.recv(bytearray(1), 2, tag=9)
            await until(lost.done)
            del lost

    with pytest.raises(WorkerError, match="the worker's") as caught:
        on_loop(main)
    note = caught.value.__notes__[0]
    assert note.startswith("nobody awaited this transfer: recv of 1 bytes from rank 1")


def test_an_exception_that_cannot_travel_is_told_as_text() -> None:
    async def worker(comm: Any) -> None:
        class Odd(Exception):
            def __reduce__(self) -> Any:
                raise TypeError("not picklable")

        raise Odd("odd thing")

    async def main() -> None:
        async with aiocomm.spawn(worker, 1):
            pass

    with pytest.raises(WorkerError, match="odd thing") as caught:
        asyncio.run(main())
    assert caught.value.__cause__ is None


def test_an_error_here_ends_the_workers(on_loop: Callable[[Any], None]) -> None:
    async def worker(comm: Any) -> None:
        signal.pause()  # does not even run its loop

    async def main() -> None:
        async with aiocomm.spawn(worker, 2):
            raise LookupError("here")

    with pytest.raises(LookupError, match="here"):
        on_loop(main)


def test_the_loss_of_workers_that_are_stopped_is_no_news(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    close = aiocomm.Communicator._close

    async def close_once_they_are_gone(comm: aiocomm.Communicator, drain: bool) -> None:
        await until(lambda: not any(peer.alive for peer in comm.peers))
        await close(comm, drain)

    async def worker(comm: Any) -> None:
        signal.pause()

    async def main() -> None:
        async with aiocomm.spawn(worker, 2, warmup=True):
            raise LookupError("here")

    monkeypatch.setattr(aiocomm.Communicator, "_close", close_once_they_are_gone)
    with pytest.raises(LookupError, match="here"):
        asyncio.run(main())
    assert not caplog.messages


def test_workers_that_ignore_the_request_are_killed() -> None:
    async def worker(comm: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        await comm.send(np.zeros(1), dst=0)
        while True:
            signal.pause()

    async def main() -> None:
        async with aiocomm.spawn(worker, 1, grace_s=0.2) as comm:
            await comm.recv(np.zeros(1), src=1)
            raise LookupError("here")

    with pytest.raises(LookupError):
        asyncio.run(main())


def test_a_worker_that_dies_explains_the_loss(on_loop: Callable[[Any], None]) -> None:
    """Waiting for a worker that fails ends in that worker's error, not just in the loss of a peer."""

    async def worker(comm: Any) -> None:
        raise ArithmeticError("the reason")

    async def main() -> None:
        async with aiocomm.spawn(worker, 1, grace_s=PATIENCE_S) as comm:
            await comm.recv(np.zeros(1), src=1)

    with pytest.raises(WorkerError, match="the reason"):
        on_loop(main)


def test_a_killed_worker_is_reported_with_its_signal() -> None:
    async def worker(comm: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    async def main() -> None:
        async with aiocomm.spawn(worker, 1):
            pass

    with pytest.raises(WorkerError, match="ended by signal 9") as caught:
        asyncio.run(main())
    assert caught.value.exit_code == -9


@pytest.mark.parametrize("warmup", [False, True])
def test_a_worker_whose_work_is_done_before_this_process_knows_that_all_have_come(
    on_loop: Callable[[Any], None], warmup: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def worker(comm: Any) -> None:
        pass

    collect = Client.collect

    async def collect_late(self: Client) -> None:
        pid = world._workers[0].process.pid
        with contextlib.suppress(ChildProcessError):  # its end has been seen, and taken, already
            await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        await collect(self)

    async def main() -> None:
        async with world as comm:
            with pytest.raises(aiocomm.PeerLostError):
                await comm.recv_array(1)

    monkeypatch.setattr(Client, "collect", collect_late)
    world = aiocomm.spawn(worker, 1, warmup=warmup)
    on_loop(main)


class DiesOnArrival:
    """Ends the process that unpickles it, before that has joined the world."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_a_worker_that_never_joins_does_not_hold_up_the_rest(on_loop: Callable[[Any], None]) -> None:
    async def worker(comm: Any, _: Any) -> None:
        pass

    async def main() -> None:
        async with aiocomm.spawn(worker, 2, DiesOnArrival()):
            raise AssertionError("unreachable")

    with pytest.raises((WorkerError, ExceptionGroup)) as caught:
        on_loop(main)
    errors = caught.value.exceptions if isinstance(caught.value, ExceptionGroup) else [caught.value]
    assert {error.exit_code for error in errors if isinstance(error, WorkerError)} == {3}


def test_cancelling_ends_the_workers() -> None:
    async def worker(comm: Any) -> None:
        signal.pause()

    async def main() -> None:
        entered = asyncio.Event()

        async def body() -> None:
            async with aiocomm.spawn(worker, 2):
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(body())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_whatever_returns_an_awaitable_is_a_worker(on_loop: Callable[[Any], None]) -> None:
    async def worker(comm: Any, factor: float) -> None:
        await comm.send(np.full(1, factor), dst=0)

    @functools.wraps(worker)
    def wrapper(comm: Any, factor: float) -> Any:
        return worker(comm, factor)

    class Caller:
        def __call__(self, comm: Any, factor: float) -> Any:
            return worker(comm, factor)

    async def main() -> None:
        for what in (wrapper, Caller(), functools.partial(wrapper), lambda comm, f: worker(comm, f)):
            async with aiocomm.spawn(what, 1, 2.0) as comm:
                assert await comm.recv_array(src=1) == 2.0

    on_loop(main)


def test_a_worker_that_returns_no_awaitable_fails() -> None:
    async def main() -> None:
        with pytest.raises(WorkerError, match="must be a coroutine function: it returned int, which cannot"):
            async with aiocomm.spawn(lambda comm: 3, 1):
                pass

    asyncio.run(main())


def _is_deaf(pid: int) -> bool:
    """Whether a process has SIGINT blocked, or ignores it."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in status if line.startswith(("SigBlk", "SigIgn"))]
    return any(mask >> (signal.SIGINT - 1) & 1 for mask in masks)


def test_an_interruption_is_not_the_workers() -> None:
    """Ctrl-C goes to the whole group, also while a worker still imports."""

    async def worker(comm: Any) -> None:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        os.kill(os.getpid(), signal.SIGINT)

    async def main() -> None:
        spawned = aiocomm.spawn(worker, 1)
        spawned._start(fresh_address(), fresh_token())  # what it does first
        try:
            assert _is_deaf(spawned._workers[0].process.pid)
            assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        finally:
            await spawned._stop()
        async with aiocomm.spawn(worker, 1):
            pass

    asyncio.run(main())


def test_a_worker_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(process: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def main() -> None:
        async with aiocomm.spawn(asyncio.sleep):
            pass

    monkeypatch.setattr(os, "pidfd_open", none_left)
    with pytest.raises(OSError, match="Too many open files"):
        asyncio.run(main())


def test_mistakes() -> None:
    with pytest.raises(aiocomm.UsageError, match="cannot spawn 0 workers"):
        aiocomm.spawn(lambda comm: None, 0)
    with pytest.raises(aiocomm.UsageError, match=r"n=1\.5 is not an integer"):
        aiocomm.spawn(lambda comm: None, 1.5)  # type: ignore[arg-type]
    with pytest.raises(aiocomm.UsageError, match="must be a coroutine function"):
        aiocomm.spawn(3, 1)  # type: ignore[arg-type]

    def worker(comm: Any) -> None:
        pass

    with pytest.raises(
        aiocomm.UsageError, match=r"must be a coroutine function \(async def\), and worker is"
    ):
        aiocomm.spawn(worker, 1)
    for grace_s in (-1.0, float("nan")):
        with pytest.raises(aiocomm.UsageError, match="grace_s must not be negative"):
            aiocomm.spawn(lambda comm: None, 1, grace_s=grace_s)


def test_what_cannot_travel_is_told_before_anything_starts(on_loop: Callable[[Any], None]) -> None:
    lock = threading.Lock()

    async def worker(comm: Any, *_: Any) -> None:
        lock.acquire()

    async def main() -> None:
        with pytest.raises(
            aiocomm.UsageError, match=r"cannot be sent to another process \(cannot pickle '_thr"
        ):
            await aiocomm.spawn(worker, 1).__aenter__()
        with pytest.raises(TypeError, match="what it is made of") as caught:
            await aiocomm.spawn(functools.partial(print), 1, ctypes.pointer(ctypes.c_int(3))).__aenter__()
        assert isinstance(caught.value.__cause__, ValueError)

    on_loop(main)


@pytest.mark.parametrize("kept", [False, True], ids=["", "the user's own registration is kept"])
def test_a_worker_of_a_module_that_nobody_else_can_import(kept: bool, tmp_path: Path) -> None:
    """pytest's import mode `importlib` leaves folders of tests out of the path."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    source = (
        "import numpy as np\n"
        "SCALE = 3.0\n"
        "class Work:\n"
        "    def of(self, x): return x * SCALE\n"
        "async def worker(comm, work):\n"
        "    await comm.send(work.of(np.ones(2)), 0)\n"
    )
    (folder / "test_mine.py").write_text(source)
    spec = importlib.util.spec_from_file_location("hidden.test_mine", folder / "test_mine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        if kept:
            cloudpickle.register_pickle_by_value(module)

        async def main() -> None:
            for worker in (module.worker, functools.partial(module.worker)):
                async with aiocomm.spawn(worker, 1, module.Work()) as comm:
                    assert (await comm.recv_array(1)).tolist() == [3.0, 3.0]

        asyncio.run(main())
        assert (spec.name in cloudpickle.list_registry_pickle_by_value()) is kept
        if kept:
            cloudpickle.unregister_pickle_by_value(module)
    finally:
        del sys.modules[spec.name]

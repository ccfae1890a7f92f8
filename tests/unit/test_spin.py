"""`aiocomm.run(spin=…)`: a program on a loop that polls for completions before it sleeps."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from harness import world

import aiocomm
from aiocomm._loop.spin import SpinSelector
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("link", ["shm", "tcp"])
def test_a_program_runs_on_it(link: str) -> None:
    async def main() -> str:
        assert isinstance(getattr(asyncio.get_running_loop(), "_selector", None), SpinSelector)
        async with world(2, warmup=True, links=(link,)) as (a, b):
            for nbytes in (10, 1 << 20):
                sent, got = np.full(nbytes, 7, np.uint8), np.zeros(nbytes, np.uint8)
                for _ in range(20):
                    got.fill(0)
                    sending = a.send(sent, 1)
                    await b.recv(got, 0)
                    await sending
                    np.testing.assert_array_equal(got, sent)
            with pytest.raises(aiocomm.DeadlineExceeded):
                await b.recv(bytearray(1), 0, deadline=0.01)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(b.recv(bytearray(1), 0), 0.001)
            task = asyncio.create_task(asyncio.wait_for(b.recv(bytearray(1), 0), None))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(b.from_thread.send, b"x", 1) is None
            assert bytes(await b.recv_array(1)) == b"x"
            assert b.statistics().posted_receives == 0
        return "done"

    assert aiocomm.run(main(), spin=50e-6) == "done"


def test_without_a_spin_it_is_asyncios_own() -> None:
    async def main() -> type:
        return type(asyncio.get_running_loop()._selector)  # type: ignore[attr-defined]

    assert aiocomm.run(main()) is not SpinSelector
    assert aiocomm.run(main(), spin=1e-6) is SpinSelector


def test_the_programs_error_comes_out() -> None:
    async def main() -> None:
        async with world(2, warmup=True) as (a, _):
            await a.recv(bytearray(1), 7)

    with pytest.raises(aiocomm.UsageError, match="no rank 7"):
        aiocomm.run(main(), spin=50e-6)


@pytest.mark.parametrize("spin", [-1, 2, math.nan])
def test_a_bad_spin_is_refused(spin: float) -> None:
    async def main() -> None:
        raise AssertionError("it must not run")

    with pytest.raises(aiocomm.UsageError, match=rf"spin={spin}: seconds, 0 to 1"):
        aiocomm.run(main(), spin=spin)


@pytest.mark.parametrize("spin", [0, 50e-6])
def test_where_a_loop_runs_already_it_says_what_to_write(spin: float) -> None:
    async def inner() -> None:
        raise AssertionError("it must not run")

    async def main() -> None:
        with pytest.raises(aiocomm.UsageError, match="write `await main"):
            aiocomm.run(inner(), spin=spin)

    asyncio.run(main())


class Asked:
    """A native spinner in a selector's eyes; notes what it was asked for, and by which thread."""

    def __init__(self, meanwhile: Callable[[], Any] = lambda: None) -> None:
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self._meanwhile = meanwhile

    def add(self, engine: object) -> None:
        """One more engine."""

    def spin(self, seconds: float) -> bool:
        assert seconds > 0
        self.calls.append("spin")
        self.threads.add(threading.get_ident())
        self._meanwhile()
        return False

    def look(self) -> bool:
        self.calls.append("look")
        return False

    def prepare_to_sleep(self) -> bool:
        return True  # there is something: the selector must not sleep

    def woken(self) -> None:
        """The selector is through."""


def selector_over(spinner: Asked) -> SpinSelector:
    """A selector with one engine, and this spinner."""
    selector = SpinSelector(40e-6)
    selector._spinner = spinner  # type: ignore[assignment]
    selector.add(object())  # type: ignore[arg-type]
    return selector


def test_a_loop_with_something_to_run_only_looks() -> None:
    asked = Asked()
    selector = selector_over(asked)
    selector.select(None)
    selector.select(0)
    assert asked.calls == ["spin", "look"]
    assert asked.threads == {threading.get_ident()}
    selector.close()


def test_loops_in_several_threads_spin_one_at_a_time() -> None:
    """More spinners than cores cost milliseconds: one per process, and whoever comes meanwhile sleeps."""
    asked = Asked()
    other = selector_over(asked)

    def elsewhere() -> None:
        thread = threading.Thread(target=other.select)
        thread.start()
        thread.join()

    spinning = Asked(elsewhere)
    first = selector_over(spinning)
    first.select(None)
    assert spinning.calls == ["spin"]
    assert asked.calls == ["look"], "it did not spin"
    other.select(None)
    assert asked.calls == ["look", "spin"], "the first has let go"
    for selector in (first, other):
        selector.close()


async def one_after_the_other(link: str) -> None:
    spinner = _core.Spinner(600.0)  # longer than a test may take: each turn has to look at all of them
    async with world(3, links=(link,), warmup=True) as comms:
        for comm in comms:
            spinner.add(comm._engine)
        for receiver, sender in itertools.permutations(comms, 2):
            got = bytearray(1)
            receiving = receiver.recv(got, sender.rank)
            sending = sender.send(b"x", receiver.rank)
            while not (receiving.done() and sending.done()):
                spinner.spin(math.inf)
            assert got == b"x"
        spinner.prepare_to_sleep()  # from here on the loop waits by itself
        for comm in comms:
            spinner.discard(comm._engine)


@pytest.mark.parametrize("link", ["shm", "tcp"])
def test_communicators_of_one_loop_are_looked_at_together(link: str) -> None:
    asyncio.run(one_after_the_other(link))


def test_a_spinner_outlives_its_engines_and_they_it() -> None:
    async def main() -> None:
        async with world(2, warmup=True) as (a, b):
            short, long = _core.Spinner(50e-6), _core.Spinner(50e-6)
            for comm in (a, b):
                short.add(comm._engine)
            long.add(a._engine)  # it takes it over
            short.prepare_to_sleep()
            del short
            gc.collect()
            sending = b.send(b"x", 0)
            got = bytearray(1)
            await a.recv(got, 1)
            await sending
            assert got == b"x"
            long.discard(b._engine)  # which it does not have
            long.discard(a._engine)
        assert not long.spin(math.inf)
        assert not long.prepare_to_sleep()

    asyncio.run(main())


def test_a_long_spin_ends_for_timers_descriptors_and_threads() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with world(2, links=("shm",), warmup=True) as (a, b):
            await asyncio.sleep(0.001)
            assert await asyncio.to_thread(lambda: 7) == 7
            reader, writer = os.pipe()
            came = asyncio.Event()
            loop.add_reader(reader, came.set)
            os.write(writer, b"x")
            await came.wait()
            loop.remove_reader(reader)
            for one in (reader, writer):
                os.close(one)
            receiving = b.recv(bytearray(1), 0)  # an await spins, too
            later = loop.call_later(0.001, lambda: a.send(b"x", 1))
            await receiving
            later.cancel()

    # Longer than a test may take.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(SpinSelector(600.0))) as runner:
        runner.run(main())


@pytest.mark.parametrize("spin", [0.0, 50e-6])
def test_what_is_no_coroutine_cannot_be_run(spin: float) -> None:
    async def main() -> None:
        raise AssertionError("nobody has called it")

    with pytest.raises(aiocomm.UsageError, match=r"is no coroutine: call it, run\(main\(\)\)"):
        aiocomm.run(main, spin=spin)  # type: ignore[arg-type]
    with pytest.raises(aiocomm.UsageError, match=r"main=5 is no coroutine$"):
        aiocomm.run(5, spin=spin)  # type: ignore[arg-type]

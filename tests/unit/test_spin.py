"""`aiocomm.run(spin=…)`: a program on a loop that polls for completions before it sleeps."""

from __future__ import annotations

import asyncio
import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from harness import world

import aiocomm
from aiocomm._loop.spin import SpinSelector

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


class Asked:
    """An engine in a selector's eyes; notes for how long it was asked to spin, and by which thread."""

    def __init__(self, meanwhile: Callable[[], Any] = lambda: None) -> None:
        self.spins: list[float] = []
        self.threads: set[int] = set()
        self._meanwhile = meanwhile

    def spin(self, seconds: float) -> bool:
        self.spins.append(seconds)
        self.threads.add(threading.get_ident())
        self._meanwhile()
        return False

    def prepare_to_sleep(self) -> bool:
        return True  # there is something: the selector must not sleep

    def woken(self) -> None:
        """The selector is through."""


def test_communicators_of_one_loop_share_one_spin() -> None:
    selector, engines = SpinSelector(40e-6), [Asked(), Asked()]
    for engine in engines:
        selector.add(engine)  # type: ignore[arg-type]
    selector.select(None)
    assert [engine.spins for engine in engines] == [[20e-6], [20e-6]]
    assert engines[0].threads == engines[1].threads == {threading.get_ident()}
    selector.select(0)
    assert engines[0].spins == [20e-6, 0.0], "a loop with something to run only looks"
    selector.discard(engines[0])  # type: ignore[arg-type]
    selector.select(None)
    assert engines[0].spins == [20e-6, 0.0]
    assert engines[1].spins == [20e-6, 0.0, 40e-6]
    selector.close()


def test_loops_in_several_threads_spin_one_at_a_time() -> None:
    """More spinners than cores cost milliseconds: one per process, and whoever comes meanwhile sleeps."""
    other, asked = SpinSelector(40e-6), Asked()
    other.add(asked)  # type: ignore[arg-type]

    def elsewhere() -> None:
        thread = threading.Thread(target=other.select)
        thread.start()
        thread.join()

    first, spinning = SpinSelector(40e-6), Asked(elsewhere)
    first.add(spinning)  # type: ignore[arg-type]
    first.select(None)
    assert spinning.spins == [40e-6]
    assert asked.spins == [0.0], "it looked, and did not spin"
    other.select(None)
    assert asked.spins == [0.0, 40e-6], "the first has let go"
    for selector in (first, other):
        selector.close()

"""What keeps transfers of pages under way, with transfers that end when they are told to."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aiocomm._loop.backend import current_backend
from aiocomm.errors import StaleHandleError
from aiocomm.pages import lease, mover
from aiocomm.pages.mover import Mover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """One loop: a task is cancelled twice where `Task.cancel` is."""
    return "asyncio"


class Slow:
    """A transfer that has not ended when it is cancelled."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.end: Callable[[], object] = lambda: None

    def add_done_callback(self, call: Callable[[Any], object]) -> None:
        self.end = lambda: call(self)

    def cancel(self) -> bool:
        self.asked.set()
        return True

    def cancelled(self) -> bool:
        return self.asked.is_set()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_rows_that_are_refused_are_tried_again_later_and_later(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of host memory, which is pinned in the meantime; what reaches no memory of a GPU never will."""
    now = 100.0
    monkeypatch.setattr(lease.time, "monotonic", lambda: now)
    layout: Any = None
    pages = lease.RemotePages(1, layout, None, {}, on_gpu, lease._ByRows())
    other = pages._view(layout)
    pauses = []
    for _ in range(9):
        pages.refuse_rows()
        until = other._by_rows.not_before
        assert not other.by_rows
        if on_gpu:
            assert until == math.inf
            return
        pauses.append(until - now)
        now = until
        assert other.by_rows
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


class Done:
    """A transfer that has ended well as soon as it is submitted."""

    def add_done_callback(self, call: Callable[[Any], object]) -> None:
        call(self)

    def cancelled(self) -> bool:
        return False

    def exception(self) -> None:
        return None


async def test_nothing_is_written_to_a_peer_that_has_come_back_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its regions have the numbers that those of its earlier incarnation had."""
    monkeypatch.setattr(mover, "_BREATH_S", 0.0)  # others get a turn after each
    current = 1

    def check_remote(region: Any, channel: Any) -> int:
        if region.generation != current:
            raise StaleHandleError("an earlier incarnation", 1)
        return 0

    async def turn() -> None:
        nonlocal current
        current = 2

    backend = SimpleNamespace(name="asyncio", turn=turn)
    comm: Any = SimpleNamespace(_backend=backend, _staged=0, _check_remote=check_remote)
    pages: Any = SimpleNamespace(of_owner=SimpleNamespace(generation=1), _regions={})
    moving = Mover(comm, "put_pages", None, None)
    moving.check([pages])
    submitted = []

    def jobs() -> Iterator[Any]:
        for number in range(3):
            submitted.append(number)
            transfer: Any = Done()
            moving._flying[transfer] = lambda: None
            yield transfer

    with pytest.raises(StaleHandleError):
        await moving.run(jobs())
    assert submitted == [0]


@pytest.mark.parametrize("cancels", [1, 2, 3])
async def test_a_call_that_is_cancelled_again_gives_its_staging_memory_back(cancels: int) -> None:
    """All calls of a communicator share what may be staged: what one keeps would slow the others for ever."""
    comm: Any = SimpleNamespace(_backend=current_backend(), _staged=0)
    moving = Mover(comm, "put_pages", None, None)
    transfer: Any = Slow()
    begun = asyncio.Event()

    def jobs() -> Iterator[Any]:
        moving.staged(1000)
        moving._flying[transfer] = lambda: None
        begun.set()
        yield transfer

    task = asyncio.create_task(moving.run(jobs()))
    await begun.wait()
    assert comm._staged
    for _ in range(cancels):
        task.cancel()
        await transfer.asked.wait()
        await asyncio.sleep(0)
        assert not task.done()  # the transfer still reads that memory
    transfer.end()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert comm._staged == 0

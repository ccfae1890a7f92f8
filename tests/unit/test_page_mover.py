"""What keeps transfers of pages under way, with transfers that end when they are told to."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aiocomm._loop.backend import current_backend
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


@pytest.mark.parametrize("cancels", [1, 2, 3])
async def test_a_call_that_is_cancelled_again_gives_its_staging_memory_back(cancels: int) -> None:
    """All calls of a communicator share what may be staged: what one keeps would slow the others for ever."""
    comm: Any = SimpleNamespace(_backend=current_backend(), _staged=0)
    mover = Mover(comm, "put_pages", None, None)
    transfer: Any = Slow()
    begun = asyncio.Event()

    def jobs() -> Iterator[Any]:
        mover.staged(1000)
        mover._flying[transfer] = lambda: None
        begun.set()
        yield transfer

    task = asyncio.create_task(mover.run(jobs()))
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

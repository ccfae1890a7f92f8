"""Async iterators that native callbacks feed; they work on asyncio and trio alike.

Who iterates over a mailbox of a `Broadcast` owns it: the broadcast knows it weakly, so that one whose
iteration was left (`break`, a task that was cancelled) is not fed for ever. Only while somebody waits for its
next item the broadcast keeps it: what else keeps a waiting task is that which will wake it.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

__all__ = ["Broadcast", "Mailbox", "Share"]

T = TypeVar("T")

_FEW: Final = 16  # subscribers, gone or not, that nobody minds


class Mailbox(Generic[T]):
    """An unbounded queue; each item is given to one iteration. Cancelling a wait loses nothing.

    Args:
        on_close: called by `aclose`.
        waited_for: holds it while somebody waits for an item.
    """

    def __init__(
        self,
        on_close: Callable[[Mailbox[T]], None] | None = None,
        waited_for: set[Mailbox[T]] | None = None,
    ) -> None:
        self._items: deque[T] = deque()
        self._waiters: deque[anyio.Event] = deque()
        self._closed = False
        self._on_close = on_close
        self._waited_for: set[Mailbox[T]] = set() if waited_for is None else waited_for

    def put(self, item: T) -> None:
        """Add an item, on the loop's thread."""
        if not self._closed:
            self._items.append(item)
            self._wake()

    def _wake(self) -> None:
        if self._waiters:
            self._waiters.popleft().set()

    def wake_all(self) -> None:
        """Have all that wait look again."""
        while self._waiters:
            self._waiters.popleft().set()

    def close(self) -> None:
        """End the iteration once the queue is empty."""
        self._closed = True
        self.wake_all()

    def __len__(self) -> int:
        return len(self._items)

    def __aiter__(self) -> Mailbox[T]:
        return self

    async def __anext__(self) -> T:
        return await self.take(None)

    async def take(self, share: Share[T] | None) -> T:
        """The next item, for a share that may be closed meanwhile."""
        while not self._items or (share is not None and share.closed):
            if self._closed or (share is not None and share.closed):
                raise StopAsyncIteration
            event = anyio.Event()
            self._waiters.append(event)
            self._waited_for.add(self)
            try:
                await event.wait()
            except BaseException:
                if event in self._waiters:
                    self._waiters.remove(event)
                elif self._items:
                    self._wake()  # we were woken for an item that we do not take
                raise
            finally:
                if not self._waiters:
                    self._waited_for.discard(self)
        return self._items.popleft()

    async def aclose(self) -> None:
        """Stop iterating; what is queued is dropped."""
        self.close()
        self._items.clear()
        if self._on_close is not None:
            self._on_close(self)
            self._on_close = None


class Share(Generic[T]):
    """One of several iterations over a mailbox, each of which gets a part of its items."""

    def __init__(self, box: Mailbox[T]) -> None:
        self._box = box
        self.closed = False

    def __aiter__(self) -> Share[T]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, T]:
        return self._box.take(self)

    async def aclose(self) -> None:
        """Stop iterating; what is queued is left to other iterations."""
        self.closed = True
        self._box.wake_all()


class Broadcast(Generic[T]):
    """Gives each item to every subscriber that is left.

    Args:
        on_empty: called when none is: at the latest with the next item.
    """

    def __init__(self, on_empty: Callable[[], None] | None = None) -> None:
        self._subscribers: list[weakref.ref[Mailbox[T]]] = []
        self._many = _FEW  # as many are worth a look for those that were let go
        self._waited_for: set[Mailbox[T]] = set()
        self._on_empty = on_empty
        self._closed = False

    def __len__(self) -> int:
        return len(self._boxes())

    def _boxes(self) -> list[Mailbox[T]]:
        return [box for ref in self._subscribers if (box := ref()) is not None]

    def subscribe(self) -> Mailbox[T]:
        """A new mailbox that gets every item from now on, for as long as the caller keeps it."""
        box: Mailbox[T] = Mailbox(self._drop, self._waited_for)
        if self._closed:
            box.close()
        else:
            if len(self._subscribers) >= self._many:  # nothing may be published for a long time
                self._subscribers = [ref for ref in self._subscribers if ref() is not None]
                self._many = max(_FEW, 2 * len(self._subscribers))
            self._subscribers.append(weakref.ref(box))
        return box

    def _drop(self, gone: Mailbox[T] | None) -> None:
        """Forget one, and those that were collected. (No callback does: it could come on any thread.)"""
        self._subscribers = [ref for ref in self._subscribers if ref() not in (None, gone)]
        if not self._subscribers and self._on_empty is not None:
            self._on_empty()

    def publish(self, item: T) -> None:
        """Give an item to all, on the loop's thread."""
        boxes = self._boxes()
        for box in boxes:
            box.put(item)
        if len(boxes) < len(self._subscribers):
            self._drop(None)

    def close(self) -> None:
        """End all iterations."""
        self._closed = True
        for box in self._boxes():
            box.close()

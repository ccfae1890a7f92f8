"""Async iterators that native callbacks feed; they work on asyncio and trio alike."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Broadcast", "Mailbox"]

T = TypeVar("T")


class Mailbox(Generic[T]):
    """An unbounded queue; each item is given to one iteration. Cancelling a wait loses nothing."""

    def __init__(self, on_close: Callable[[], None] | None = None) -> None:
        self._items: deque[T] = deque()
        self._waiters: deque[anyio.Event] = deque()
        self._closed = False
        self._on_close = on_close

    def put(self, item: T) -> None:
        """Add an item, on the loop's thread."""
        if not self._closed:
            self._items.append(item)
            self._wake()

    def _wake(self) -> None:
        if self._waiters:
            self._waiters.popleft().set()

    def close(self) -> None:
        """End the iteration once the queue is empty."""
        self._closed = True
        while self._waiters:
            self._waiters.popleft().set()

    def __len__(self) -> int:
        return len(self._items)

    def __aiter__(self) -> Mailbox[T]:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            event = anyio.Event()
            self._waiters.append(event)
            try:
                await event.wait()
            except BaseException:
                if event in self._waiters:
                    self._waiters.remove(event)
                elif self._items:
                    self._wake()  # we were woken for an item that we do not take
                raise
        return self._items.popleft()

    async def aclose(self) -> None:
        """Stop iterating; what is queued is dropped."""
        self.close()
        self._items.clear()
        if self._on_close is not None:
            self._on_close()
            self._on_close = None


class Broadcast(Generic[T]):
    """Gives each item to every subscriber."""

    def __init__(self) -> None:
        self._subscribers: list[Mailbox[T]] = []
        self._closed = False

    def __len__(self) -> int:
        return len(self._subscribers)

    def subscribe(self, on_empty: Callable[[], None] | None = None) -> Mailbox[T]:
        """A new mailbox that gets every item from now on."""

        def drop() -> None:
            if box in self._subscribers:
                self._subscribers.remove(box)
            if not self._subscribers and on_empty is not None:
                on_empty()

        box: Mailbox[T] = Mailbox(drop)
        if self._closed:
            box.close()
        else:
            self._subscribers.append(box)
        return box

    def publish(self, item: T) -> None:
        """Give an item to all, on the loop's thread."""
        for box in self._subscribers:
            box.put(item)

    def close(self) -> None:
        """End all iterations."""
        self._closed = True
        for box in self._subscribers:
            box.close()

"""What a child that was forked lets go of at once: it has copies of its parent's descriptors, but no threads.

Sockets that listen would go on taking connections, which nobody serves, when the parent has closed its own. A
connection would not end with the parent, and its death be noticed by nobody who is told of it by that alone.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["tell_of_fork"]


class Told(Protocol):
    """What wants to know."""

    def _on_fork(self) -> None:
        """This process is a child that was forked. No other thread runs."""


_told: weakref.WeakSet[Told] = weakref.WeakSet()


def tell_of_fork(thing: Told) -> None:
    """Call `thing._on_fork()` in children that are forked from now on, for as long as it lives."""
    _told.add(thing)


def _tell() -> None:
    for thing in list(_told):
        thing._on_fork()


os.register_at_fork(after_in_child=_tell)

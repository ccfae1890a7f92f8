"""The end of a group at one of its ranks: others may be in a call of it, or about to make the next one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from aiocomm.errors import ClosedError
from aiocomm.region import look_away

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiocomm.collectives.scope import Scope

__all__ = ["close"]


def close(scope: Scope, channels: Sequence[int]) -> None:
    """Give up a scope's calls, and the one that this rank will not make; others end with `TransferCancelled`.

    Args:
        channels: native ones, which are closed once the others were told.
    """
    comm, error = scope.comm, ClosedError("the group was closed")
    for number, call in list(scope.calls.items()):
        scope.abort(number, error)
        call.abort(error, comm.rank)
    words = scope.abort(scope.repeats.last + 1, error)
    comm._engine.drain()
    untold = {word for word in words if not word.done()}
    for word in words:
        word.add_done_callback(partial(_told, scope, channels, untold))
    if not untold:
        _close(scope, channels)
        comm._engine.drain()


def _told(scope: Scope, channels: Sequence[int], untold: set[Any], word: Any) -> None:
    look_away(word)
    if word in untold:
        untold.remove(word)
        if not untold:
            _close(scope, channels)


def _close(scope: Scope, channels: Sequence[int]) -> None:
    if not scope.comm.closed:
        for index in channels:
            scope.comm._engine.close_channel(index)

"""The end of a group at one of its ranks: others may be in a call of it, or about to make the next one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from aiocomm.collectives.headers import Why, abort_message
from aiocomm.collectives.scope import _ABORT_S, _ABORT_TAG
from aiocomm.errors import ClosedError

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
    message = abort_message(scope.repeats.last + 1, Why.OTHER, -1, str(error))
    others = [rank for rank in scope.group.ranks if rank != comm.rank]
    words = [comm._send(message, rank, scope.index, _ABORT_TAG, _ABORT_S, 0) for rank in others]
    comm._engine.drain()
    untold = {word for word in words if not word.done()}
    for word in words:
        word.add_done_callback(partial(_told, scope, channels, untold))
    if not untold:
        _close(scope, channels)
        comm._engine.drain()


def _told(scope: Scope, channels: Sequence[int], untold: set[Any], word: Any) -> None:
    if not word.cancelled():
        word.exception()  # nobody has to know
    if word in untold:
        untold.remove(word)
        if not untold:
            _close(scope, channels)


def _close(scope: Scope, channels: Sequence[int]) -> None:
    if not scope.comm.closed:
        for index in channels:
            scope.comm._engine.close_channel(index)

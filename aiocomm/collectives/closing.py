"""The end of a group, or of one of its channels, at one rank: others may be in a call, or about to make one.

A channel may be opened again, and numbers of calls must meet then. So the call that is given up in advance
when it is closed counts as made: by the next call that is tried on the closed channel, or else when it is
opened again. Calls that are tried on a closed channel are given up, too, each by its number.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from aiocomm.collectives.headers import Why
from aiocomm.errors import ClosedError
from aiocomm.region import look_away

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiocomm.channel import Channel
    from aiocomm.collectives.scope import Scope
    from aiocomm_native import Transfer

__all__ = ["close", "pause", "refuse", "resume"]


def close(scope: Scope, channels: Sequence[int]) -> None:
    """Give up a scope's calls, and the one that this rank will not make; others end with `TransferCancelled`.

    Args:
        channels: native ones, which are closed once the others were told.
    """
    comm = scope.comm
    words = _give_up(scope, ClosedError("the group was closed"))
    comm._engine.drain()
    untold = {word for word in words if not word.done()}
    for word in words:
        word.add_done_callback(partial(_told, scope, channels, untold))
    if not untold:
        _close(scope, channels)
        comm._engine.drain()


def pause(scope: Scope, channel: Channel) -> None:
    """Its channel is closed: give up as `close` does, but so that calls meet again once it is open again."""
    _count_given_up(scope)
    _give_up(scope, _closed(channel))
    scope.given_up = scope.repeats.last + 1
    scope.drop_spare()


def refuse(scope: Scope, channel: Channel) -> NoReturn:
    """Give up a call that was tried on a closed channel: the others may wait in it.

    Raises:
        ClosedError: always.
    """
    error = _closed(channel)
    number = scope.repeats.take()
    scope.drop_failed(number)
    if number > scope.given_up:
        scope.abort(number, error)
    raise error


def resume(scope: Scope, channel: Channel) -> None:
    """Its channel was opened again: go on behind the calls that were given up meanwhile, by whichever rank.

    What the scope is sent lies in its own native channels, which stay as they are, their priority among it.
    """
    _count_given_up(scope)
    while scope.is_given_up(scope.repeats.last + 1):
        scope.drop_failed(scope.repeats.take())
    scope.channel = channel


def _closed(channel: Channel) -> ClosedError:
    return ClosedError(f"channel {channel.name!r} was closed")


def _count_given_up(scope: Scope) -> None:
    while scope.repeats.last < scope.given_up:
        scope.drop_failed(scope.repeats.take())


def _give_up(scope: Scope, error: ClosedError) -> list[Transfer[Any]]:
    """Returns the words to the others, of which the last say what else they shall not wait for."""
    for number, call in list(scope.calls.items()):
        scope.abort(number, error)
        call.abort(error, scope.comm.rank)
    return scope.abort(scope.repeats.last + 1, error, Why.CLOSED)


def _told(scope: Scope, channels: Sequence[int], untold: set[Any], word: Any) -> None:
    look_away(word)
    if word in untold:
        untold.remove(word)
        if not untold:
            _close(scope, channels)


def _close(scope: Scope, channels: Sequence[int]) -> None:
    if not scope.comm.closed:
        for index in channels:
            scope.comm._engine.close_channel(index, for_good=True)  # its name has the group's number

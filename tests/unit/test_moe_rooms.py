"""Memory of long lists is used again once nobody has any part of it."""

from __future__ import annotations

import numpy as np

from aiocomm.moe.rooms import LONG, Rooms


def test_memory_is_used_again_once_no_array_is_over_it() -> None:
    rooms = Rooms()
    address = id(rooms.take(LONG))
    again = rooms.take(LONG)
    assert id(again) == address
    array = np.frombuffer(again, np.int64, 4, 8)[1:]
    del again
    other = rooms.take(LONG)
    assert id(other) != address
    del array
    assert id(rooms.take(LONG)) == address
    assert len(rooms.take(LONG + 1)) == LONG + 1


def test_what_somebody_has_stays_theirs() -> None:
    rooms = Rooms()
    taken = [rooms.take(LONG) for _ in range(30)]
    assert len({id(one) for one in taken}) == 30
    for number, one in enumerate(taken):
        one[:] = bytes([number]) * LONG
    assert all(one[0] == one[-1] == number for number, one in enumerate(taken))
    assert rooms.take(16) is not rooms.take(16)

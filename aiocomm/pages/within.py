"""Pages that move within this process: what is read must not be written by the same operation.

Copies of one operation run in no order, some through other memory and some beside each other, so what a page
that is both would bring is not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from aiocomm.errors import UsageError
from aiocomm.pages.memory import span_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from numpy.typing import NDArray

    from aiocomm.communicator import Communicator
    from aiocomm.pages.layout import Pages
    from aiocomm.pages.lease import RemotePages
    from aiocomm.pages.ranges import Ranges
    from aiocomm.region import RemoteRegion

    Spans = tuple[NDArray[np.int64], NDArray[np.int64]]  # addresses, and bytes from each

__all__ = ["check_apart"]


async def check_apart(
    comm: Communicator, moves: Sequence[tuple[Pages, RemotePages, Callable[[], Awaitable[Ranges]]]]
) -> None:
    """Refuse an operation that would write bytes of this process that it reads, too.

    Args:
        moves: views that move in one operation, and what is planned for each.

    Raises:
        UsageError: it would.
    """
    local: list[Spans] = []
    leased: list[Spans] = []
    for pages, remote, ranges in moves:
        if remote.rank != comm.rank:
            return  # all are of one lease
        planned = await ranges()
        for array, plane in zip(pages.layout.planes, remote.layout.planes, strict=True):
            here, there = span_of(pages.arrays[array])[0], _address_of(comm, remote._regions[plane])
            local.append((here + pages.layout.start + planned.near, planned.rows))
            if there is not None:
                leased.append((there + remote.layout.start + planned.far, planned.nbytes))
    if leased and _meet(local, leased):
        raise UsageError(
            "some of these pages would be read and written by one operation, in no order: copy in two steps, "
            "by way of other pages"
        )


def _address_of(comm: Communicator, remote: RemoteRegion) -> int | None:
    """Where the memory of a region of this process begins. None: it is closed, or has no bytes."""
    region = comm._regions.get(remote._number)
    kept = None if region is None or not region.nbytes else region._keep
    if kept is None:
        return None
    return span_of(np.frombuffer(kept, np.uint8))[0] if isinstance(kept, memoryview) else int(kept[1])


def _meet(some: Sequence[Spans], others: Sequence[Spans]) -> bool:
    """Whether any two of them have bytes in common."""
    begin, nbytes = (np.concatenate(one) for one in zip(*some, strict=True))
    first, length = (np.concatenate(one) for one in zip(*others, strict=True))
    begun = np.searchsorted(np.sort(begin), first + length, "left")
    ended = np.searchsorted(np.sort(begin + nbytes), first, "right")
    return bool((begun > ended).any())

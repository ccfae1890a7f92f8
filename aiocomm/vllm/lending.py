"""The side that has the blocks: it leases them to those who come for them.

A lease ends before the engine has the blocks back. Whoever comes late is refused by this worker's engine, and
never reads what another request has put there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from aiocomm.vllm.caches import differing
from aiocomm.vllm.ranks import readers

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aiocomm.communicator import Communicator
    from aiocomm.pages import PageLease
    from aiocomm.vllm.caches import Caches, Geometry
    from aiocomm.vllm.ranks import Place
    from aiocomm.vllm.steps import Outcome
    from aiocomm.vllm.words import Words

__all__ = ["Lender"]

_GONE: Final = 4096
_log = logging.getLogger("aiocomm.vllm")


@dataclass
class _Kept:
    """A request's blocks: leased until all who read them have said so, or nobody living will."""

    blocks: tuple[int, ...] | None = None  # once the engine gave them
    lease: PageLease | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # it is leased, or will not be
    claimed_by: set[int] = field(default_factory=set)  # ranks of the world
    read_by: set[int] = field(default_factory=set)  # tensor-parallel ranks of the engine that reads


class Lender:
    """Keeps requests' blocks for other engines.

    Args:
        start: runs a coroutine as a task.
        lease_s: seconds for which blocks are kept that nobody living has claimed.
    """

    def __init__(
        self,
        comm: Communicator,
        words: Words,
        place: Place,
        caches: Caches,
        geometry: Geometry,
        outcome: Outcome,
        start: Callable[[Coroutine[Any, Any, None]], Any],
        lease_s: float,
    ) -> None:
        self._comm = comm
        self._words = words
        self._place = place
        self._caches = caches
        self._geometry = asdict(geometry)
        self._outcome = outcome
        self._start = start
        self._lease_s = lease_s
        self._kept: dict[str, _Kept] = {}
        self._left = False
        self._gone: dict[str, None] = {}  # the newest requests whose blocks are not here any more

    def keep(self, request: str, blocks: tuple[int, ...]) -> None:
        """Lease a request's blocks."""
        if self._left or request in self._gone:  # nobody comes, or whoever was to come has said so already
            self._outcome.of_sent(request)
            return
        kept = self._entry(request)
        kept.blocks = blocks
        self._start(self._lease(request, kept, blocks))

    def lent(self) -> dict[str, tuple[int, ...]]:
        """Blocks that the engine gave, and does not have back."""
        return {request: kept.blocks for request, kept in self._kept.items() if kept.blocks is not None}

    def give_back(self) -> None:
        """Have the engine take all back, and what it gives from now on."""
        self._left = True
        for request in self.lent():
            self._outcome.of_sent(request)
        self._kept.clear()

    async def _lease(self, request: str, kept: _Kept, blocks: tuple[int, ...]) -> None:
        try:
            kept.lease = await self._comm.lease_pages(self._caches.pages(), self._caches.of_blocks(blocks))
        except BaseException:
            self._start(self._end(request))  # the engine has its blocks back, whatever was wrong
            raise
        kept.settled.set()

    def hear(self, source: int, said: dict[str, Any]) -> None:
        """Heed what a rank of the world says.

        Raises:
            LookupError: it says nothing that is known.
        """
        request, kind = said["request"], said["kind"]
        if kind == "ask":
            self._start(self._answer(source, request, said))
        elif request in self._gone:
            return
        elif kind == "claim":
            self._entry(request).claimed_by.add(source)
        elif kind == "read":
            kept = self._entry(request)
            kept.read_by.add(said["rank"])
            place = self._place
            if kept.read_by >= readers(place.rank, place.ranks, said["ranks"], place.heads):
                self._start(self._end(request))
        elif kind == "release":
            self._start(self._end(request))
        else:
            raise LookupError(f"kind {kind!r}")

    def _entry(self, request: str) -> _Kept:
        """Of a request that is here, or will be: words may come before the step that says so."""
        if request not in self._kept:
            self._kept[request] = _Kept()
            self._watch(request)
        return self._kept[request]

    def _watch(self, request: str) -> None:
        asyncio.get_running_loop().call_later(self._lease_s, self._look_at, request, self._kept[request])

    def _look_at(self, request: str, kept: _Kept) -> None:
        if self._kept.get(request) is not kept:
            return
        if any(self._words.is_there(rank) for rank in kept.claimed_by):
            self._watch(request)
            return
        if kept.blocks is not None:
            _log.warning(
                "nobody came for request %s within %g s: its blocks are freed", request, self._lease_s
            )
            self._outcome.of_unclaimed()
        self._start(self._end(request))

    async def _end(self, request: str) -> None:
        """Have the engine take its blocks back, now or when it gives them."""
        kept = self._kept.pop(request, None)
        self._gone[request] = None
        if len(self._gone) > _GONE:
            del self._gone[next(iter(self._gone))]
        if kept is None:
            return
        kept.settled.set()
        if kept.lease is not None:
            try:
                await kept.lease.aclose()
            except BaseException:  # somebody may read them yet
                self._kept[request] = kept
                raise
        if kept.blocks is not None:
            self._outcome.of_sent(request)

    async def _answer(self, source: int, request: str, asked: dict[str, Any]) -> None:
        """Hand out the lease, or say why not."""
        why = differing(self._geometry, asked["geometry"])
        if why is None and request not in self._gone:
            kept = self._entry(request)
            kept.claimed_by.add(source)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(asked["within_s"]):
                    await kept.settled.wait()
            if kept.lease is not None and self._kept.get(request) is kept:
                await self._words.answer(source, asked, kept.lease.handle)
                return
        refused = {"refused": why or "its blocks are not here"}
        await self._words.answer(source, asked, json.dumps(refused).encode())

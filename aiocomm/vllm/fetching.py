"""The side that goes on with requests: it gets their blocks from the engine that computed them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from aiocomm.errors import DeadlineExceeded, UsageError
from aiocomm.vllm.ranks import readers, shares

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aiocomm.communicator import Communicator
    from aiocomm.vllm.caches import Caches, Geometry
    from aiocomm.vllm.ranks import Place, Share
    from aiocomm.vllm.steps import Fetch, Origin, Outcome
    from aiocomm.vllm.words import Words

__all__ = ["Fetcher"]

_log = logging.getLogger("aiocomm.vllm")


@dataclass(slots=True)
class _Wanted:
    """What several requests of this engine may want: such of one prompt that asks for several answers."""

    requests: int = 0  # that were claimed for, and have not ended
    fetched: bool = False  # for one of them at least


class Fetcher:
    """Gets requests' blocks, and tells their origins when nobody here needs them any more.

    Args:
        start: runs a coroutine as a task.
        fetch_s: seconds that a fetch may take.
    """

    def __init__(
        self,
        comm: Communicator,
        words: Words,
        place: Place,
        caches: Caches,
        geometry: Geometry,
        outcome: Outcome,
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None] | None],
        fetch_s: float,
    ) -> None:
        self._comm = comm
        self._words = words
        self._place = place
        self._caches = caches
        self._pages = caches.pages()
        self._block_bytes = caches.block_bytes
        self._geometry = asdict(geometry)
        self._outcome = outcome
        self._start = start
        self._fetch_s = fetch_s
        self._bulk = comm.channel("vllm.kv")
        self._broken = False
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._wanted: dict[Origin, _Wanted] = {}

    def begin(self, fetch: Fetch) -> None:
        """Get a request's blocks; its end goes to the outcome, whatever it is."""
        task = asyncio.get_running_loop().create_task(self._get_all(fetch))
        self._under_way[fetch.request] = task
        self._wanted.setdefault(fetch.origin, _Wanted(1)).fetched = True
        task.add_done_callback(partial(self._ended, fetch, time.monotonic()))

    def cancel(self, request: str) -> None:
        """Break a fetch off, unless it has ended."""
        if request in self._under_way:
            self._under_way[request].cancel()

    def claim(self, origin: Origin) -> None:
        """Say that somebody here will come. One worker speaks for its engine, to all of the other."""
        self._wanted.setdefault(origin, _Wanted()).requests += 1
        if self._place.rank == 0:
            self._tell_all(origin, "claim")

    def release(self, origin: Origin) -> None:
        """One comes no more. The last says that nobody does, or that all who came are done."""
        wanted = self._last(origin)
        if wanted is not None and wanted.fetched:  # by another worker perhaps not yet
            self._start(self._tell_read(origin))
        elif wanted is not None and self._place.rank == 0:
            self._tell_all(origin, "release")

    def wanted(self) -> list[Origin]:
        """Of which requests here wait, as often as they do."""
        return [origin for origin, wanted in self._wanted.items() for _ in range(wanted.requests)]

    async def aclose(self) -> None:
        """Break all off: nobody has asked for that, and what did not come is not taken for come."""
        self._broken = True
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _get_all(self, fetch: Fetch) -> None:
        async with asyncio.timeout(self._fetch_s), asyncio.TaskGroup() as group:
            for share in self._shares(fetch.origin):
                group.create_task(self._get(fetch, share))

    async def _get(self, fetch: Fetch, share: Share) -> None:
        owner = await self._words.find(fetch.origin, share.rank)
        asked = {"kind": "ask", "request": fetch.origin.request, "geometry": self._geometry}
        answer = await self._words.ask(owner, asked)
        if answer.startswith(b"{"):
            raise UsageError(f"engine {fetch.origin.engine} refuses: {json.loads(answer)['refused']}")
        if len(fetch.there) != len(fetch.here):
            raise UsageError(f"{len(fetch.there)} blocks there for {len(fetch.here)} here")
        axis = self._caches.head_axis
        await self._comm.get_pages(
            self._comm.remote_pages(answer).slice(axis, *share.there),
            self._caches.of_blocks(fetch.there),
            self._pages.slice(axis, *share.here),
            self._caches.of_blocks(fetch.here),
            channel=self._bulk,
        )

    def _ended(self, fetch: Fetch, begun_s: float, task: asyncio.Task[None]) -> None:
        """Nothing touches its blocks any more, here or there."""
        del self._under_way[fetch.request]
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            _log.warning("request %s did not get its blocks: %s", fetch.request, _why(failure, self._fetch_s))
        came = failure is None and not task.cancelled()
        self._outcome.of_received(fetch.request, failed=failure is not None or self._broken)
        if came:
            self._outcome.of_fetch(time.monotonic() - begun_s, len(fetch.here) * self._block_bytes)
        if self._last(fetch.origin) is None:
            return
        if came:
            self._start(self._tell_read(fetch.origin))
        else:  # nor does anybody else of this engine need them
            self._tell_all(fetch.origin, "release")

    def _last(self, origin: Origin) -> _Wanted | None:
        """A request has ended: what was wanted, unless another of this engine wants it yet."""
        wanted = self._wanted.setdefault(origin, _Wanted(1))
        wanted.requests -= 1
        return None if wanted.requests else self._wanted.pop(origin)

    def _tell_all(self, origin: Origin, kind: str) -> None:
        """Say something of a request to all workers of the engine that has it."""
        self._start(self._words.tell(origin, range(origin.ranks), {"kind": kind}))

    async def _tell_read(self, origin: Origin) -> None:
        """Of its shares each worker says it, and one of what nobody reads."""
        place = self._place
        read = {"kind": "read", "rank": place.rank, "ranks": place.ranks}
        await self._words.tell(origin, [share.rank for share in self._shares(origin)], read)
        if place.rank == 0:
            idle = [r for r in range(origin.ranks) if not readers(r, origin.ranks, place.ranks, place.heads)]
            await self._words.tell(origin, idle, {"kind": "release"})

    def _shares(self, origin: Origin) -> list[Share]:
        return shares(self._place.rank, self._place.ranks, origin.ranks, self._place.heads)


def _why(failure: BaseException, fetch_s: float) -> str:
    while isinstance(failure, ExceptionGroup):
        failure = failure.exceptions[0]
    if isinstance(failure, TimeoutError) and not isinstance(failure, DeadlineExceeded):
        return f"they did not come within {fetch_s:g} s"
    return str(failure)

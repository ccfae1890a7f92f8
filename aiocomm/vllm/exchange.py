"""One worker's part in handing blocks over, on its loop."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from aiocomm.errors import PeerError
from aiocomm.vllm.fetching import Fetcher
from aiocomm.vllm.lending import Lender
from aiocomm.vllm.steps import Step
from aiocomm.vllm.words import Words

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from aiocomm.communicator import Communicator
    from aiocomm.vllm.caches import Caches, Geometry
    from aiocomm.vllm.ranks import Place
    from aiocomm.vllm.steps import Outcome

__all__ = ["Exchange"]

_log = logging.getLogger("aiocomm.vllm")


class Exchange:
    """Lends and fetches.

    Args:
        comm: a communicator of the world of all engines.
        outcome: what has ended is put there.
        lease_s: seconds for which blocks are kept that nobody living has claimed.
        fetch_s: seconds that a fetch may take.
    """

    def __init__(
        self,
        comm: Communicator,
        place: Place,
        caches: Caches,
        geometry: Geometry,
        outcome: Outcome,
        lease_s: float,
        fetch_s: float,
    ) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._ends = False
        self._words = words = Words(comm, place.stage, fetch_s)
        self._lender = Lender(comm, words, place, caches, geometry, outcome, self._start, lease_s)
        self._fetcher = Fetcher(comm, words, place, caches, geometry, outcome, self._start, fetch_s)

    async def run(self) -> None:
        """Answer the others until cancelled."""
        self._start(self._words.follow())
        try:
            async for source, said in self._words.heard():
                try:
                    self._lender.hear(source, said)
                except (LookupError, TypeError) as error:
                    _log.warning("what rank %d of the world said is not understood: %r", source, error)
        finally:
            self._ends = True
            await self._fetcher.aclose()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def give_back(self) -> None:
        """Have the engine take back what it gave, now that nobody reads it: the world was left."""
        self._lender.give_back()

    def rest(self) -> Step:
        """What another exchange begins with in this one's place, now that the world was left."""
        return Step(keep=self._lender.lent(), claim=self._fetcher.wanted())

    def begin(self, step: Step) -> None:
        """Begin all that a step asks for."""
        for request, blocks in step.keep.items():
            self._lender.keep(request, blocks)
        for origin in step.claim:
            self._fetcher.claim(origin)
        for origin in step.release:
            self._fetcher.release(origin)
        for fetch in step.fetch:
            self._fetcher.begin(fetch)
        for request in step.cancel:
            self._fetcher.cancel(request)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        if self._ends:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, PeerError | TimeoutError):  # whoever asked is gone
            _log.error("handing KV blocks over goes on without this: %r", error, exc_info=error)

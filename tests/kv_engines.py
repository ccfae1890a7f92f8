"""Workers of engines that hand KV blocks over, each on a thread with a loop, as in vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from harness import until

from aiocomm.vllm.caches import Axes, Caches, Geometry
from aiocomm.vllm.ranks import Place, heads_of
from aiocomm.vllm.steps import Fetch, Origin, Step
from aiocomm.vllm.worker import Options, Worker

if TYPE_CHECKING:
    from numpy.typing import NDArray

LAYERS, PAGES, HEADS, TOKENS, CONTENT = 3, 24, 4, 2, 8
BLOCK = 2 * TOKENS  # a block is two pages
GEOMETRY = Geometry("a-model", "bfloat16", LAYERS, BLOCK, HEADS, CONTENT, 1)
NEVER = 600.0


def whole(seed: int) -> NDArray[np.uint16]:
    """An engine's cache, of all heads."""
    shape = (LAYERS, PAGES, HEADS, TOKENS, CONTENT)
    return np.random.default_rng(seed).integers(0, 1 << 16, shape, np.uint16)


class Engine:
    """The workers of one engine, and their part of its cache each."""

    def __init__(
        self, address: str, name: str, seed: int, ranks: int = 1, heads: int = HEADS, **options: Any
    ) -> None:
        self.name, self.ranks, self.heads = name, ranks, heads
        self.options = Options.of({"address": address, "lease_s": NEVER, "fetch_s": NEVER} | options)
        everything = whole(seed)[:, :, :heads]
        self.memory = [
            self.placed(np.ascontiguousarray(everything[:, :, slice(held.start, held.stop)]), rank)
            for rank, held in ((rank, heads_of(rank, ranks, heads)) for rank in range(ranks))
        ]
        self.workers = [
            Worker(self.options, Place(name, 0, rank, ranks, heads)) for rank in range(self.ranks)
        ]
        self.sent: list[set[str]] = [set() for _ in range(ranks)]
        self.received: list[set[str]] = [set() for _ in range(ranks)]
        self.failed: set[str] = set()

    def placed(self, data: NDArray[np.uint16], rank: int) -> Any:
        """A rank's part of the cache, where it is to lie."""
        return data

    def seen(self, rank: int) -> NDArray[np.uint16]:
        """What is there."""
        found: NDArray[np.uint16] = self.memory[rank]
        return found

    def join(self, geometry: Geometry = GEOMETRY) -> None:
        for worker, memory in zip(self.workers, self.memory, strict=True):
            worker.join(Caches([memory], Axes(1, 2, 3), BLOCK), geometry)

    def begin(self, **step: Any) -> None:
        for worker in self.workers:
            worker.begin(Step(**step))

    def look(self) -> None:
        for rank, worker in enumerate(self.workers):
            sent, received, failed = worker.ended()
            self.sent[rank] |= sent
            self.received[rank] |= received
            self.failed |= failed

    async def has_sent(self, request: str) -> None:
        await until(lambda: self.look() or all(request in sent for sent in self.sent))

    async def has_received(self, request: str) -> bool:
        """Whether it was without failure."""
        await until(lambda: self.look() or all(request in received for received in self.received))
        return request not in self.failed

    def origin(self, request: str) -> Origin:
        return Origin(self.name, self.ranks, request)

    def blocks(self, blocks: list[int]) -> NDArray[np.uint16]:
        """Of all heads, as the ranks have them, where each head is held once."""
        holders = range(0, self.ranks, max(1, self.ranks // self.heads))
        there = np.concatenate([self.seen(rank) for rank in holders], axis=2)
        pages = [2 * block + half for block in blocks for half in (0, 1)]
        return there[:, pages]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


async def hand_over(prefill: Engine, decode: Engine) -> None:
    """Some blocks, of engines of any degrees, and nothing else."""
    before = [decode.seen(rank).copy() for rank in range(decode.ranks)]
    prefill.begin(keep={"p": (3, 1, 10)})
    decode.begin(fetch=fetch("d", prefill.origin("p"), [3, 1, 10], [0, 7, 5]))
    assert await decode.has_received("d")
    await prefill.has_sent("p")
    for rank, expected in enumerate(before):
        held = heads_of(rank, decode.ranks, decode.heads)
        came = whole(1)[:, :, slice(held.start, held.stop)]
        for there, here in ((3, 0), (1, 7), (10, 5)):
            expected[:, 2 * here : 2 * here + 2] = came[:, 2 * there : 2 * there + 2]
        np.testing.assert_array_equal(decode.seen(rank), expected)


def fetch(request: str, origin: Origin, there: list[int], here: list[int]) -> list[Fetch]:
    return [Fetch(request, origin, tuple(there), tuple(here))]

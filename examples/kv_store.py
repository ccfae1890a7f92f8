"""A second tier for KV pages: a store keeps what a cache has no room for, and gives it back when asked."""

import asyncio
from collections import OrderedDict

import numpy as np

import aiocomm

LAYERS, BYTES = 8, 4096  # of a page; K and V of all its layers lie together
PAGES, SLOTS = 64, 16  # of the store, and of the cache
REQUESTS, PER_REQUEST = 12, 4


async def store(comm: aiocomm.Communicator) -> None:
    """Own the memory. Whoever has the lease writes and reads it, without this process taking part."""
    pool = aiocomm.empty((PAGES, LAYERS, BYTES), np.uint8)  # shared: GPUs of other processes reach it, too
    async with await comm.lease_pages(aiocomm.Pages(pool)) as lease:
        await comm.send(lease.handle, dst=0)
        await comm.recv(bytearray(4), src=0)  # until the other is done


class Cache:
    """A few requests' pages at hand, those of the others in the store. Here NumPy's, as well a GPU's."""

    def __init__(self, comm: aiocomm.Communicator, handle: bytes) -> None:
        self.comm = comm
        self.memory = np.zeros((SLOTS, LAYERS, BYTES), np.uint8)
        self.pages = aiocomm.Pages(self.memory)
        self.store = comm.remote_pages(handle)
        self.free = [list(range(i, i + PER_REQUEST)) for i in range(0, SLOTS, PER_REQUEST)]
        self.here: OrderedDict[int, list[int]] = OrderedDict()  # the one used longest ago first
        self.there: set[int] = set()

    def place(self, request: int) -> range:
        """Where the store has a request's pages."""
        return range(request * PER_REQUEST, (request + 1) * PER_REQUEST)

    async def use(self, request: int) -> np.ndarray:
        """Bring a request's pages to the cache, and put out those of another for it."""
        if request in self.here:
            self.here.move_to_end(request)
            return self.memory[self.here[request]]
        if not self.free:
            out, slots = self.here.popitem(last=False)
            await self.comm.put_pages(self.pages, slots, self.store, self.place(out))
            self.there.add(out)
            self.free.append(slots)
        slots = self.here[request] = self.free.pop()
        if request in self.there:
            await self.comm.get_pages(self.store, self.place(request), self.pages, slots)
        else:
            self.memory[slots] = np.random.default_rng(request).integers(0, 256, (LAYERS, BYTES))  # prefill
        return self.memory[slots]


async def main() -> None:
    async with aiocomm.spawn(store, n=1) as comm:
        cache = Cache(comm, (await comm.recv_array(src=1)).tobytes())
        for request in [*range(REQUESTS), *range(REQUESTS)]:
            async with asyncio.timeout(10):
                found = await cache.use(request)
            expected = np.random.default_rng(request).integers(0, 256, (LAYERS, BYTES))
            assert (found == expected).all(), request
        moved = comm.statistics().links["shm"]
        await comm.send(b"done", dst=1)
        print(f"{len(cache.there)} requests were put out ({moved.bytes_sent:,} bytes) and came back")


if __name__ == "__main__":
    aiocomm.run(main())

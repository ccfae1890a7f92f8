"""Hundreds of requests in flight at once, with nothing but `asyncio.gather`."""

import asyncio

import numpy as np

import aiocomm

WORKERS, REQUESTS = 3, 100


async def worker(comm: aiocomm.Communicator) -> None:
    async def answer(tag: int) -> None:
        x = await comm.recv_array(src=0, tag=tag)
        await comm.send(np.cumsum(x), dst=0, tag=tag)

    await asyncio.gather(*(answer(tag) for tag in range(REQUESTS)))


async def ask(comm: aiocomm.Communicator, rank: int, tag: int) -> float:
    x = np.full(100 + tag, float(rank))
    out = np.empty_like(x)
    await asyncio.gather(comm.send(x, dst=rank, tag=tag), comm.recv(out, src=rank, tag=tag))
    np.testing.assert_array_equal(out, np.cumsum(x))
    return float(out[-1])


async def main() -> None:
    async with aiocomm.spawn(worker, n=WORKERS) as comm:
        asked = [(rank, tag) for rank in range(1, WORKERS + 1) for tag in range(REQUESTS)]
        sums = await asyncio.gather(*(ask(comm, rank, tag) for rank, tag in asked))
        assert sums == [rank * (100.0 + tag) for rank, tag in asked]
        print(f"{len(sums)} answers from {WORKERS} processes")


if __name__ == "__main__":
    aiocomm.run(main())

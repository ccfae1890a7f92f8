"""Threads that block beside a loop that does not: `comm.from_thread` has the blocking twins."""

import asyncio

import numpy as np

import aiocomm

THREADS = 4


async def worker(comm: aiocomm.Communicator) -> None:
    def square(tag: int) -> None:  # runs in a thread: a tokenizer, a data loader, somebody's callback
        x = np.empty(1000)
        comm.from_thread.recv(x, src=0, tag=tag)
        comm.from_thread.send(x * x, dst=0, tag=tag)

    await asyncio.gather(*(asyncio.to_thread(square, tag) for tag in range(THREADS)))


async def main() -> None:
    async with aiocomm.spawn(worker, n=1) as comm:

        def ask(tag: int) -> float:
            x = np.full(1000, float(tag))
            comm.from_thread.send(x, dst=1, tag=tag)
            out = np.empty_like(x)
            status = comm.from_thread.recv(out, src=1, tag=tag, deadline=10.0)
            assert status.nbytes == out.nbytes
            return float(out.sum())

        sums = await asyncio.gather(*(asyncio.to_thread(ask, tag) for tag in range(THREADS)))
        assert sums == [1000.0 * tag * tag for tag in range(THREADS)]
        print(f"{THREADS} threads asked {THREADS} threads: {sums}")


if __name__ == "__main__":
    aiocomm.run(main())

"""A pipeline of four stages: micro-batches move on while the next are computed; checked against one process.

python examples/pipeline.py
"""

import asyncio

import numpy as np

import aiocomm

STAGES, BATCHES, ROWS, WIDTH = 4, 8, 64, 128


def weights(stage: int) -> np.ndarray:
    w: np.ndarray = np.random.default_rng(stage).normal(size=(WIDTH, WIDTH)) / WIDTH**0.5
    return w


def layer(x: np.ndarray, stage: int) -> np.ndarray:
    y: np.ndarray = np.tanh(x @ weights(stage))
    return y


def batches() -> list[np.ndarray]:
    return list(np.random.default_rng(99).normal(size=(BATCHES, ROWS, WIDTH)))


async def stage(comm: aiocomm.Communicator) -> list[np.ndarray]:
    """Receives are posted ahead, so a batch arrives while the one before it is computed."""
    inward = [np.empty((ROWS, WIDTH)) for _ in range(BATCHES)] if comm.rank else batches()
    receives = [comm.recv(x, src=comm.rank - 1, tag=n) for n, x in enumerate(inward)] if comm.rank else []
    sends, results = [], []
    for number, x in enumerate(inward):
        if receives:
            await receives[number]
        y = await asyncio.to_thread(layer, x, comm.rank)  # stands for a kernel: the loop stays free
        if comm.rank < STAGES - 1:
            sends.append(comm.send(y, dst=comm.rank + 1, tag=number))
        else:
            results.append(y)
    await asyncio.gather(*sends)
    # The first stage checks, so the last one sends it the results.
    if comm.rank == STAGES - 1:
        await asyncio.gather(*(comm.send(y, dst=0, tag=BATCHES + n) for n, y in enumerate(results)))
    return results


async def main() -> None:
    async with aiocomm.spawn(stage, n=STAGES - 1) as comm:
        got = [np.empty((ROWS, WIDTH)) for _ in range(BATCHES)]
        ends = [comm.recv(y, src=STAGES - 1, tag=BATCHES + n) for n, y in enumerate(got)]
        await stage(comm)
        await asyncio.gather(*ends)
    for x, y in zip(batches(), got, strict=True):
        for number in range(STAGES):
            x = layer(x, number)
        np.testing.assert_allclose(y, x)
    print(f"{BATCHES} micro-batches through {STAGES} stages: the same as in one process")


if __name__ == "__main__":
    aiocomm.run(main())

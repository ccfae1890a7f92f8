"""New weights for engines that go on serving: trainers hold rows of each tensor, engines columns."""

import asyncio
import json

import numpy as np

import aiocomm

TRAINERS, ENGINES, VERSIONS = 2, 2, 3
SHAPES = {"qkv": (512, 1536), "out": (512, 512), "up": (512, 2048), "down": (2048, 512)}


def tensor(name: str, version: int) -> np.ndarray:
    return np.random.default_rng([version, *name.encode()]).random(SHAPES[name], np.float32)


async def trainer(comm: aiocomm.Communicator) -> None:
    """Offer each version; its arrays are not changed before all engines have it."""
    engines = range(TRAINERS, TRAINERS + ENGINES)
    mine = {name: aiocomm.empty((rows // TRAINERS, n), np.float32) for name, (rows, n) in SHAPES.items()}
    pages = {name: aiocomm.Pages(x) for name, x in mine.items()}  # a page is a row
    for version in range(VERSIONS):
        # Each lease ends that of the version before: who comes late is refused, and has no mixture of both.
        offer = {name: (await comm.lease_pages(rows)).handle.hex() for name, rows in pages.items()}
        for name, x in mine.items():
            x[:] = np.split(tensor(name, version), TRAINERS)[comm.rank]
        await asyncio.gather(*(comm.send(json.dumps(offer).encode(), dst=engine) for engine in engines))
        await asyncio.gather(*(comm.recv(bytearray(4), src=engine) for engine in engines))


async def pull(comm: aiocomm.Communicator, into: dict[str, np.ndarray]) -> None:
    """Get our columns of all tensors from all trainers, behind whatever is more urgent."""
    bulk = comm.channel("weights", priority=aiocomm.Priority.LOW)
    offers = await asyncio.gather(*(comm.recv_array(src=rank) for rank in range(TRAINERS)))
    moves = []
    for rank, offer in enumerate(offers):
        for name, handle in json.loads(offer.tobytes()).items():
            rows, n, at = SHAPES[name][0] // TRAINERS, into[name].shape[1], comm.rank - TRAINERS
            theirs = comm.remote_pages(bytes.fromhex(handle)).slice(1, at * n, (at + 1) * n)
            ours = aiocomm.Pages(into[name]), range(rank * rows, (rank + 1) * rows)
            moves.append(comm.get_pages(theirs, range(rows), *ours, channel=bulk, deadline=30.0))
    await asyncio.gather(*moves)


async def engine(comm: aiocomm.Communicator) -> None:
    """Fill one set of weights while the other serves."""
    serving, spare = ({k: np.zeros((r, n // ENGINES), "f4") for k, (r, n) in SHAPES.items()} for _ in "ab")
    answered, busy, x = 0, asyncio.Lock(), np.ones((16, 512), np.float32)

    async def serve() -> None:
        nonlocal answered
        while True:
            async with busy:
                await asyncio.to_thread(lambda: [x @ serving[name] for name in ("qkv", "out", "up")])
            answered += 1

    requests = asyncio.create_task(serve())
    for version in range(VERSIONS):
        await pull(comm, spare)
        async with busy:  # between two requests
            serving, spare = spare, serving
        for k, w in serving.items():
            assert np.array_equal(w, np.split(tensor(k, version), ENGINES, 1)[comm.rank - TRAINERS])
        await asyncio.gather(*(comm.send(b"have", dst=rank) for rank in range(TRAINERS)))
    requests.cancel()
    print(f"engine {comm.rank - TRAINERS} has version {version}, and answered {answered} requests meanwhile")


async def work(comm: aiocomm.Communicator) -> None:
    await (trainer(comm) if comm.rank < TRAINERS else engine(comm))


async def main() -> None:
    async with aiocomm.spawn(work, n=TRAINERS + ENGINES - 1) as comm:
        await work(comm)


if __name__ == "__main__":
    aiocomm.run(main())

"""A server in miniature: a router, a prefill and a decode process; requests at once, each with its timeout.

The router (rank 0) is plain asyncio. Keys and values go from prefill to decode on a bulk channel, prompts and
tokens on an urgent one, and the tag is the request. One request is lost on purpose: only that one times out.
"""

import asyncio

import numpy as np

import aiocomm

PREFILL, DECODE, STOP, LOST, REQUESTS = 1, 2, 0, 13, 24


def channels(comm: aiocomm.Communicator) -> tuple[aiocomm.Channel, aiocomm.Channel]:
    return comm.channel("kv", weight=3.0), comm.channel("requests", priority=aiocomm.Priority.URGENT)


async def worker(comm: aiocomm.Communicator) -> None:
    serve = prefill if comm.rank == PREFILL else decode
    _, requests = channels(comm)
    async with asyncio.TaskGroup() as group:
        while True:
            prompt = np.zeros(64, np.int64)
            status = await requests.recv(prompt, src=0, tag=aiocomm.ANY_TAG)
            if status.tag == STOP:
                break
            group.create_task(serve(comm, status.tag, prompt))


async def prefill(comm: aiocomm.Communicator, request: int, prompt: np.ndarray) -> None:
    kv, _ = channels(comm)
    if request == LOST:
        return  # a bug, a crash, a full queue: decode will wait in vain
    keys = np.repeat(prompt, 4096).astype(np.float32)  # 1 MiB: stands for the prompt's keys and values
    await kv.send(keys, dst=DECODE, tag=request, deadline=30.0)


async def decode(comm: aiocomm.Communicator, request: int, prompt: np.ndarray) -> None:
    kv, requests = channels(comm)
    try:
        keys = await kv.recv_array(src=PREFILL, tag=request, deadline=4.0)
    except aiocomm.DeadlineExceeded:
        return  # give the request up; its memory is free again
    await requests.send(np.array([keys.max()]), dst=0, tag=request, deadline=30.0)


async def handle(comm: aiocomm.Communicator, request: int) -> float:
    """One request as the web framework of your choice would call it."""
    _, requests = channels(comm)
    prompt = np.full(64, request)
    answer = np.empty(1, np.float32)
    async with asyncio.timeout(5.0):
        token = requests.recv(answer, src=DECODE, tag=request)
        sends = (requests.send(prompt, dst=rank, tag=request) for rank in (PREFILL, DECODE))
        await asyncio.gather(token, *sends)  # the timeout cancels what is awaited, and nothing else
    return float(answer[0])


async def main() -> None:
    async with aiocomm.spawn(worker, n=2) as comm:
        results = await asyncio.gather(
            *(handle(comm, request) for request in range(1, REQUESTS + 1)), return_exceptions=True
        )
        for request, result in enumerate(results, start=1):
            assert isinstance(result, TimeoutError) if request == LOST else result == request
        _, requests = channels(comm)
        await asyncio.gather(*(requests.send(np.zeros(1, np.int64), dst=rank, tag=STOP) for rank in (1, 2)))
        print(f"{REQUESTS - 1} requests answered, 1 timed out")


if __name__ == "__main__":
    aiocomm.run(main())

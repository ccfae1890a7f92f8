"""Ring attention: each rank holds a part of the context; keys and values (or queries) go round the ring.

python examples/ring_attention.py

Every rank computes with the block that it has while the next one comes. The result is compared with attention
over the whole context in one process.
"""

import asyncio

import numpy as np

import aiocomm

RANKS, TOKENS, DIM = 3, 96, 32  # tokens per rank
KV, Q = "passing K and V", "passing Q"


def whole() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q, k, v = np.random.default_rng(0).normal(size=(3, RANKS * TOKENS, DIM))
    return q, k, v


def fold(state: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """Add a block to (weighted sum | sum of weights | largest score) per row: the online softmax."""
    score = q @ k.T / DIM**0.5
    top = np.maximum(state[:, -1], score.max(1))
    weight, old = np.exp(score - top[:, None]), np.exp(state[:, -1] - top)
    state[:, :DIM] = state[:, :DIM] * old[:, None] + weight @ v
    state[:, DIM] = state[:, DIM] * old + weight.sum(1)
    state[:, -1] = top


async def attend(comm: aiocomm.Communicator, passed: str) -> np.ndarray:
    mine = slice(comm.rank * TOKENS, (comm.rank + 1) * TOKENS)
    q, k, v = (np.ascontiguousarray(x[mine]) for x in whole())
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    state = np.zeros((TOKENS, DIM + 2))
    state[:, -1] = -np.inf
    block = np.stack([k, v]) if passed == KV else np.concatenate([q, state], axis=1)
    for step in range(comm.size):
        coming = np.empty_like(block)
        if passed == KV:  # the block is only read: it travels while it is used
            moves = [comm.send(block, right, tag=step), comm.recv(coming, left, tag=step)]
            await asyncio.to_thread(fold, state, q, *block)
        else:  # a query travels with its result so far, and is home after a whole round
            await asyncio.to_thread(fold, block[:, DIM:], block[:, :DIM], k, v)
            moves = [comm.send(block, right, tag=step), comm.recv(coming, left, tag=step)]
        await asyncio.gather(*moves)
        block = coming
    state = state if passed == KV else block[:, DIM:]
    return state[:, :DIM] / state[:, DIM : DIM + 1]


async def work(comm: aiocomm.Communicator) -> None:
    for passed in (KV, Q):
        out = np.empty((comm.size, TOKENS, DIM)) if comm.rank == 0 else None
        await comm.gather(out, await attend(comm, passed))
        if out is None:
            continue
        q, k, v = whole()
        weight = np.exp(q @ k.T / DIM**0.5)
        expected = weight @ v / weight.sum(1, keepdims=True)
        np.testing.assert_allclose(out.reshape(-1, DIM), expected, rtol=1e-9)
        print(f"{passed}: {out.shape[0]} ranks, {len(expected)} tokens, the same as in one process")


async def main() -> None:
    async with aiocomm.spawn(work, n=RANKS - 1) as comm:
        await work(comm)


if __name__ == "__main__":
    aiocomm.run(main())

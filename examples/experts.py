"""A mixture-of-experts layer: tokens go to the ranks that hold their experts, weighted results come back.

python examples/experts.py

A prefill batch and decode batches, with experts in blocks and by a given map. Each result is compared with
the layer computed in one process.
"""

import numpy as np

import aiocomm

RANKS, EXPERTS, CHOICES, HIDDEN = 3, 8, 2, 128
MATRICES = np.random.default_rng(0).normal(size=(EXPERTS, HIDDEN, HIDDEN)).astype(np.float32) / 8
ROUTER = np.random.default_rng(1).normal(size=(HIDDEN, EXPERTS)).astype(np.float32)
SPREAD = [2, 0, 1, 2, 0, 1, 2, 0]  # the rank of each expert


def expert(number: int, x: np.ndarray) -> np.ndarray:
    y: np.ndarray = np.maximum(x @ MATRICES[number], 0)
    return y


def choose(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each token, and their weights."""
    scores = x @ ROUTER
    ids = np.argsort(-scores, axis=1)[:, :CHOICES]
    weights = np.exp(np.take_along_axis(scores, ids, 1))
    return ids, weights / weights.sum(1, keepdims=True)


def in_one_process(x: np.ndarray) -> np.ndarray:
    ids, weights = choose(x)
    result = np.zeros_like(x)
    for number in range(EXPERTS):
        for k in range(CHOICES):
            there = ids[:, k] == number
            result[there] += weights[there, k, None] * expert(number, x[there])
    return result


async def layer(comm: aiocomm.Communicator, x: np.ndarray, placement: list[int] | None) -> np.ndarray:
    ids, weights = choose(x)
    came = await comm.dispatch(x, ids, weights, experts=EXPERTS, placement=placement, deadline=30.0)
    outputs = np.empty((len(came.rows), HIDDEN), np.float32)
    for number in came.experts:
        mine = came.of(number)
        outputs[mine] = expert(number, came.tokens[came.rows[mine]])
    y: np.ndarray = await comm.combine(outputs, came, deadline=30.0)
    return y


async def work(comm: aiocomm.Communicator) -> None:
    random = np.random.default_rng(comm.rank + 10)
    for name, tokens, placement in (
        ("prefill", 6000, None),
        ("decode", 4 + comm.rank, None),
        ("decode, experts spread", 16, SPREAD),
    ):
        x = random.normal(size=(tokens, HIDDEN)).astype(np.float32)
        np.testing.assert_allclose(await layer(comm, x, placement), in_one_process(x), rtol=2e-4, atol=2e-5)
        if comm.rank == 0:
            print(f"{name}: {tokens} tokens of rank 0, the same as in one process")
    if comm.rank == 0:
        print(comm.statistics().collectives)


async def main() -> None:
    async with aiocomm.spawn(work, n=RANKS - 1) as comm:
        await work(comm)


if __name__ == "__main__":
    aiocomm.run(main())

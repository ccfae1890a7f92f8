"""Ranks die at any moment of any calls on several channels: the others hear who it was, shrink, and go on."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
from typing import Any

import cloudpickle
import numpy as np
import pytest

import aiocomm
from aiocomm.collectives import flight
from aiocomm.launch import WorkerError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers of spawn cannot import this module
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]
WITHIN_S = 0.2  # of the first call


async def _call(group: aiocomm.Group, chosen: random.Random, channel: aiocomm.Channel | None) -> None:
    """One call that all members choose alike, with its result."""
    rank, size = group.rank, group.size
    count = chosen.choice([1, 100, 5000, 40_000, 300_000])
    root = chosen.randrange(size)
    mine = np.full(count, rank, np.float32)
    match chosen.choice(["barrier", "all_reduce", "broadcast", "all_gather", "all_to_all", "experts"]):
        case "barrier":
            await group.barrier(channel=channel)
        case "all_reduce":
            await group.all_reduce(mine, channel=channel)
            assert (mine == size * (size - 1) / 2).all()
        case "broadcast":
            await group.broadcast(mine, root, channel=channel)
            assert (mine == root).all()
        case "all_gather":
            out = np.empty((size, count), np.float32)
            await group.all_gather(out, mine, channel=channel)
            assert (out == np.arange(size)[:, None]).all()
        case "all_to_all":
            out = np.empty((size, count), np.float32)
            given = np.repeat(np.arange(size, dtype=np.float32) + 10 * rank, count)
            await group.all_to_all(out, given, channel=channel)
            assert (out == 10 * np.arange(size)[:, None] + rank).all()
        case "experts":
            tokens = chosen.choice([1, 16, 300])
            ids = (np.arange(2 * tokens).reshape(tokens, 2) + rank) % (2 * size)
            x = np.full((tokens, 512), rank, np.float32)
            came = await group.dispatch(x, ids, experts=2 * size, channel=channel)
            assert (await group.combine(came.inputs, came, channel=channel) == 2 * rank).all()


async def _rank(comm: aiocomm.Communicator, seed: int, victim: int) -> None:
    flight._EXPLANATION_S = 600  # type: ignore[misc]  # a survivor may stand still before it says why
    group = await comm.group(range(comm.size))
    moment = random.Random(seed).random() * WITHIN_S
    if comm.rank != victim:
        await comm.send(b"", victim)
    else:  # it dies in the calls of all: one that has no group yet would not hear of it by these
        for rank in range(comm.size):
            if rank != victim:
                await comm.recv(bytearray(), rank)
        threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()

    async def calls(number: int) -> None:
        chosen = random.Random(f"{seed} {number}")
        channel = comm.channel(f"channel {number}") if number else None
        while True:
            await _call(group, chosen, channel)

    ended: list[Any] = await asyncio.gather(*(calls(n) for n in range(1 + seed % 3)), return_exceptions=True)
    assert [error for error in ended if not isinstance(error, aiocomm.PeerLostError)] == []
    assert {(isinstance(error, aiocomm.PeerLostError), error.peer) for error in ended} == {(True, victim)}
    left = await group.shrink()
    assert left.ranks == tuple(rank for rank in range(comm.size) if rank != victim)
    chosen = random.Random(seed)
    for _ in range(5):
        await _call(left, chosen, None)


@pytest.mark.parametrize("links", ["shm", "tcp"])
@pytest.mark.parametrize("seed", range(8))
async def test_survivors_hear_who_died_and_go_on(
    seed: int, links: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "_EXPLANATION_S", flight._EXPLANATION_S)  # which this rank changes, too
    victim = 1 + seed % 3
    with pytest.raises(WorkerError) as caught:  # spawn reports the killed worker
        async with aiocomm.spawn(_rank, 3, seed, victim, links=links) as comm:
            await _rank(comm, seed, victim)
    assert (caught.value.rank, caught.value.exit_code) == (victim, -signal.SIGKILL)

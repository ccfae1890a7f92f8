"""Loops that spin are written to, in a ring of their own: what must hold when they sleep."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fakes import adapters

import aiocomm
from aiocomm._loop.spin import SpinSelector

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

ROUNDS = 4000


def in_two_loops(program: Callable[[int], Coroutine[None, None, None]]) -> None:
    """Each rank on a spinning loop of a thread of its own: adapters are simulated within one process."""
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(SpinSelector(200e-6))) as runner:
            try:
                runner.run(program(rank))
            except BaseException as failure:  # raised below
                failures.append(failure)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOCOMM_LIBIBVERBS", str(adapters.build()))


@pytest.mark.parametrize("sleepy", [0.0, 0.02, 0.3])
def test_a_message_reaches_a_loop_whether_it_spins_or_sleeps(tmp_path: Path, sleepy: float) -> None:
    written, taken = [0, 0], [0, 0]

    async def program(rank: int) -> None:
        moods = random.Random(rank)
        peer = 1 - rank
        got, sent = np.zeros(1, "i8"), np.zeros(1, "i8")
        async with await aiocomm.connect(f"unix://{tmp_path}/at", rank=rank, size=2, links=("rdma",)) as comm:
            for i in range(ROUNDS):
                if rank == 1:
                    await comm.recv(got, peer)
                    assert got[0] == i
                if moods.random() < sleepy:
                    await asyncio.sleep(moods.choice([0, 1e-4, 1e-3]))
                sent[0] = i
                await comm.send(sent, peer)
                if rank == 0:
                    await comm.recv(got, peer)
                    assert got[0] == i
            device = comm.links["rdma"].statistics().device
            written[rank], taken[rank] = device["ring_writes"], device["ring_frames_received"]

    in_two_loops(program)
    assert written == taken[::-1], "each is taken from where it was written"
    if not sleepy:
        assert sum(written) > 0, "loops that spin are written to"


def test_small_and_large_messages_keep_their_order(tmp_path: Path) -> None:
    sizes = [random.Random(5).choice([0, 1, 100, 130, 180, 250, 5000, 70_000]) for _ in range(300)]

    async def program(rank: int) -> None:
        peer = 1 - rank
        async with await aiocomm.connect(f"unix://{tmp_path}/at", rank=rank, size=2, links=("rdma",)) as comm:
            for seed in range(40):  # small ones, so that both loops come to be written to
                await asyncio.gather(comm.send(bytes([seed]), peer), comm.recv(bytearray(1), peer))
            sent = [np.random.default_rng(i).integers(0, 256, n, np.uint8) for i, n in enumerate(sizes)]
            sending = [comm.send(one, peer) for one in sent]
            for one in sent:
                got = np.zeros(70_000, np.uint8)
                status = await comm.recv(got, peer)
                np.testing.assert_array_equal(got[: status.nbytes], one)
            for transfer in sending:
                await transfer

    in_two_loops(program)

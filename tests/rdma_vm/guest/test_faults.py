"""What happens to an rdma pair when a process is killed, packets are lost, and a device says nothing."""

from __future__ import annotations

import mmap
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness import until
from test_link import device, hosts, random, run

import aiocomm

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Child

pytestmark = pytest.mark.anyio

MIB = 1 << 20
LARGE = 64 * MIB

VICTIM = """
import asyncio, mmap, sys
import numpy as np
import aiocomm

async def main():
    address, path = sys.argv[1:]
    with open(path, "r+b") as file:
        memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    async with aiocomm.connect(address, rank=1, size=2, links=("rdma",), warmup=True) as comm:
        waiting = comm.recv(memory, 0)
        await comm.send(b"posted", 0)
        await waiting

asyncio.run(main())
"""


@pytest.fixture
def anyio_backend() -> str:
    """One loop: what is tested here lies below it, and emulated seconds are dear."""
    return "asyncio"


async def test_the_memory_of_a_killed_peer_is_never_written_again(
    child: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffer lies in a file, so that it can be looked at when the process is gone."""
    monkeypatch.setenv("AIOCOMM_RDMA_DEVICES", "rxea0,rxea1")
    monkeypatch.setenv("AIOCOMM_HEARTBEAT_S", "1000")  # it is told of the end, without them
    in_its_middle = False
    while not in_its_middle:  # a machine that stands still may kill it late
        path, address = tmp_path / "memory", f"unix://@aiocomm-test-{secrets.token_hex(8)}"
        path.write_bytes(bytes(LARGE))
        victim = child(VICTIM, address, str(path), AIOCOMM_RDMA_DEVICES="rxeb0,rxeb1")
        async with aiocomm.connect(address, rank=0, size=2, links=("rdma",), warmup=True) as comm:
            with path.open("r+b") as file:
                seen = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
            await comm.recv(bytearray(6), 1)
            sending = comm.send(np.ones(LARGE, np.uint8), 1)
            await until(lambda seen=seen: seen[0])
            victim.kill()
            try:
                await sending
            except aiocomm.PeerLostError:
                through = False
            else:
                through = True
                await until(lambda comm=comm: not comm.peers[0].alive)
            victim.process.wait()
            left = seen.copy()
            in_its_middle = not left.all()
            assert not (through and in_its_middle), "what was sent has been written"
            # A rail that still had something to write would have done so by the time that others are through.
            async with hosts(2) as (a, b):
                for _ in range(4):
                    receiving = b.recv_array(0)
                    await a.send(random(MIB), 1)
                    await receiving
            np.testing.assert_array_equal(seen, left)


@pytest.mark.parametrize("rails", [1, 2])
async def test_packets_are_lost(rails: int) -> None:
    """One in a hundred on the first rail: the transport repeats them, and nobody gives a rail up."""
    run("tc", "qdisc", "add", "dev", "a0", "root", "netem", "loss", "1%")
    try:
        async with hosts(rails) as (a, b):
            for number in range(4):
                sent, got = random(4 * MIB + number), np.zeros(4 * MIB + number, np.uint8)
                receiving = b.recv(got, 0)
                await a.send(sent, 1)
                await receiving
                np.testing.assert_array_equal(got, sent)
                for tag in range(50):
                    small = b.recv_array(0, tag=tag)
                    await a.send(sent[: 100 + tag], 1, tag=tag)
                    np.testing.assert_array_equal(await small, sent[: 100 + tag])
            memory, back = np.zeros(MIB, np.uint8), np.zeros(MIB, np.uint8)
            async with b.register(memory) as region:
                remote = a.remote(region.handle)
                await a.put(random(MIB), remote)
                await a.get(remote, into=back)
                np.testing.assert_array_equal(memory, random(MIB))
                np.testing.assert_array_equal(back, memory)
            assert device(a)["lanes_failed"] == 0
    finally:
        run("tc", "qdisc", "del", "dev", "a0", "root")


async def test_a_request_that_takes_longer_than_a_device_would_try() -> None:
    """What comes in shows that the rail's device is not silent: the other one need not take its place."""
    run("tc", "qdisc", "add", "dev", "a1", "root", "netem", "rate", "1200kbit", "limit", "100000")
    try:
        async with hosts(2) as (a, b):
            sent, got = random(LARGE // 16), np.zeros(LARGE // 16, np.uint8)
            receiving = b.recv(got, 0)
            await a.send(sent, 1)
            await receiving
            np.testing.assert_array_equal(got, sent)
            assert device(b)["lanes_failed"] == 0
    finally:
        run("tc", "qdisc", "del", "dev", "a1", "root")

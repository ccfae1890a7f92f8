"""What only a GPU can show: large messages, kernels that run long, memory that comes back."""

from __future__ import annotations

import os
import signal
from typing import Any, Final

import anyio
import numpy as np
import pytest
from fakes import simulated
from fakes.gpu import DeviceArray, Kind, Stream, driver
from fakes.real import free_bytes, launch_late, pieces, write
from harness import until

import aiocomm

pytestmark = pytest.mark.usefixtures("real")

LINKS: Final = ("shm", "cuda")
SIZES: Final = [1, 7, 4097, (64 << 10) + 1, (1 << 20) + 3, (64 << 20) + 7, (1 << 30) + 5, 4 << 30]


@pytest.fixture
def real(gpu: object) -> None:
    if simulated.choose():
        pytest.skip("needs two GPUs, or one and FAKE_CUDA=0: the simulated driver runs no kernels")


def run(main: Any, limit_s: float) -> None:
    async def bounded() -> None:
        with anyio.fail_after(limit_s):
            await main()

    anyio.run(bounded)


@pytest.mark.timeout(300)
def test_one_byte_to_four_gib_byte_for_byte_at_odd_addresses() -> None:
    sizes = SIZES

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray, driver
        from fakes.real import pieces, read, write

        for nbytes in sizes:
            into = DeviceArray(nbytes + 8, device=1)
            driver().use(1)
            for at in (0, nbytes + 5):  # a few bytes on both sides show what is written beyond
                write(into.address + at, np.full(3, 0xEE, np.uint8))
            await comm.recv(into.part(3, nbytes), 0)
            assert (read(into.address, 3) == 0xEE).all(), nbytes
            assert (read(into.address + nbytes + 5, 3) == 0xEE).all(), nbytes
            for at, data in pieces(nbytes):
                assert np.array_equal(read(into.address + 3 + at, data.nbytes), data), (nbytes, at)
            into.close()
            await comm.send(b"good", 0)

    async def main() -> None:
        async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
            for nbytes in SIZES:
                source = DeviceArray(nbytes + 1)
                driver().use(0)
                for at, data in pieces(nbytes):
                    write(source.address + 1 + at, data)
                await comm.send(source.part(1, nbytes), 1)
                await comm.recv(bytearray(4), 1)
                source.close()

    run(main, 280)


@pytest.mark.parametrize("nbytes", [64 << 10, 256 << 20])
def test_a_long_kernel_on_the_users_stream_is_waited_for(nbytes: int) -> None:
    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        into = DeviceArray(nbytes, device=1)
        await comm.recv(into, 0)
        assert (into.numpy() == 7).all()

    async def main() -> None:
        async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
            source, stream = DeviceArray(nbytes).write(np.zeros(nbytes, np.uint8)), Stream()
            launch_late(source, 7, stream)
            sending = comm.send(source, 1, stream=stream)
            assert not stream.done()  # neither has the call waited for the kernel, nor was it over
            await sending
            stream.close()

    run(main, 60)


@pytest.mark.parametrize("direction", ["to", "from"])
@pytest.mark.parametrize(("ours", "theirs"), [("gpu", "gpu"), ("gpu", "shared"), ("shared", "gpu")])
def test_a_peer_killed_in_the_middle_of_a_copy_leaves_the_context_usable(
    ours: str, theirs: str, direction: str
) -> None:
    nbytes = 1 << 30

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        gpu = theirs == "gpu"
        array = DeviceArray(nbytes, device=1) if gpu else aiocomm.empty(nbytes, np.uint8)
        while True:
            await (comm.recv(array, 0) if direction == "to" else comm.send(array, 0))

    async def main() -> None:
        with pytest.raises(aiocomm.AiocommError):  # noqa: PT012 - spawn tells of the killed worker
            async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
                mine: Any = DeviceArray(nbytes) if ours == "gpu" else aiocomm.empty(nbytes, np.uint8)
                call = (lambda: comm.send(mine, 1)) if direction == "to" else (lambda: comm.recv(mine, 1))
                for _ in range(4):
                    await call()
                under_way = [call() for _ in range(16)]  # tens of milliseconds of copies
                await under_way[1]
                os.kill(comm.peers[0].pid, signal.SIGKILL)
                lost = 0
                for transfer in under_way:
                    try:
                        await transfer
                    except aiocomm.PeerLostError:
                        lost += 1
                assert lost > 0
                data = np.random.default_rng(1).integers(0, 256, 3 << 20, np.uint8)
                source, into = DeviceArray(data.nbytes).write(data), DeviceArray(data.nbytes, device=1)
                sent, received = comm.send(source, 0), comm.recv(into, 0)
                await sent
                await received
                assert (into.numpy() == data).all()

    run(main, 60)


@pytest.mark.timeout(300)
def test_a_hundred_thousand_transfers_over_a_thousand_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers, transfers, window = 1000, 100_000, 200
    monkeypatch.setenv("AIOCOMM_GPU_MAPPINGS", "200")

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray
        from fakes.real import free_bytes

        arrays = [DeviceArray(4096, device=1) for _ in range(buffers)]
        for start in range(0, transfers, window):
            for transfer in [comm.recv(arrays[n % buffers], 0) for n in range(start, start + window)]:
                await transfer
            if start == transfers // 10:
                before = free_bytes(1)
        assert free_bytes(1) >= before - (8 << 20), (before, free_bytes(1))
        for n in range(0, buffers, 97):
            assert (arrays[n].numpy() == n % 256).all()
        await comm.send(b"good", 0)

    async def main() -> None:
        async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
            arrays = [DeviceArray(4096).write(np.full(4096, n % 256, np.uint8)) for n in range(buffers)]
            for start in range(0, transfers, window):
                for transfer in [comm.send(arrays[n % buffers], 1) for n in range(start, start + window)]:
                    await transfer
                if start == transfers // 10:
                    before = free_bytes(0)
            assert free_bytes(0) >= before - (8 << 20), (before, free_bytes(0))
            await comm.recv(bytearray(4), 1)

    run(main, 280)


@pytest.mark.parametrize("kind", [Kind.MALLOC, Kind.VMM])
def test_freed_memory_comes_back_while_the_peer_lives(kind: Kind) -> None:
    """The peer had it mapped, and lets go of it when its owner has freed it."""
    nbytes = 1 << 30 if kind is Kind.MALLOC else 64 << 20

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        into = DeviceArray(nbytes, device=1)
        await comm.send(b"x", 0)
        while True:
            size = bytearray(1)
            await comm.recv(size, 0)
            if not size[0]:
                return
            # Pulled: mapped here.
            await comm.recv(into.part(0, 4096), 0)
            await comm.send(into.part(0, 4096), 0)

    async def main() -> None:
        async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
            small = DeviceArray(4096)
            await comm.recv(bytearray(1), 1)  # its array is there, which may be on the same GPU
            driver().use(0)
            for _ in range(2):  # the first time, the driver itself takes some
                before = free_bytes(0)
                source = DeviceArray(nbytes, kind=kind)
                await comm.send(b"x", 1)
                await comm.send(source.part(nbytes // 2, 4096), 1)
                await comm.recv(small, 1)
                source.close()
                await until(lambda wanted=before - (16 << 20): free_bytes(0) >= wanted)
            await comm.send(b"\0", 1)

    run(main, 60)

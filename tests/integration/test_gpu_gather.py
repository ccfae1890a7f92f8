"""Pages without a common stride, copied by a kernel on a few multiprocessors; and kernels run on the host.

The simulated driver compiles nothing, and does what its name says. That the sources do the same is tested by
running them as C++, one thread after the other: no thread of theirs waits for another.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fakes import simulated
from fakes.gpu import DeviceArray, Driver, driver
from harness import world
from integration.test_gpu_reductions import assert_it_compiles

import aiocomm
from aiocomm.collectives import kernels
from aiocomm.pages import gather

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from conftest import Pair
    from fakes.simulated import Simulator

LINKS = ("shm", "cuda")


@pytest.fixture
async def pair(gpu: Driver, images: None) -> AsyncIterator[Pair]:
    """Ranks 0 and 1, with GPU memory."""
    async with world(2, links=LINKS, warmup=True) as (a, b):
        yield a, b


def on_gpu(array: np.ndarray[Any, Any], device: int = 0) -> DeviceArray:
    return DeviceArray(array.shape, array.dtype, device % driver().count).write(array)


def blocks(count: int, nbytes: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(1, 255, (count, nbytes), np.uint8)


def order(count: int, of: int, seed: int) -> Any:
    return np.random.default_rng(seed).permutation(of)[:count]


@pytest.mark.anyio
@pytest.mark.parametrize("nbytes", [1, 250, 4096, 100_000])
async def test_scattered_pages(pair: Pair, nbytes: int) -> None:
    a, b = pair
    data = blocks(300, nbytes)
    ours, target = aiocomm.Pages(on_gpu(data)), on_gpu(np.zeros_like(data), 1)
    give, take = order(200, 300, 1), order(200, 300, 2)
    async with await b.lease_pages(aiocomm.Pages(target)) as lease:
        remote = a.remote_pages(lease.handle)
        await a.put_pages(ours, give, remote, take, sm_budget=8)
        expected = np.zeros_like(data)
        expected[take] = data[give]
        assert np.array_equal(target.numpy(), expected)
        into = on_gpu(np.zeros_like(data))
        await a.get_pages(remote, take, aiocomm.Pages(into), give, sm_budget=2)
        back = np.zeros_like(data)
        back[give] = data[give]
        assert np.array_equal(into.numpy(), back)


@pytest.mark.anyio
async def test_one_launch_for_what_has_no_stride(simulator: Simulator, pair: Pair) -> None:
    a, b = pair
    names = ("cuLaunchKernel", "cuMemcpyBatchAsync", "cuMemcpy2DAsync")
    data = blocks(3000, 256)
    ours, target = aiocomm.Pages(on_gpu(data)), on_gpu(np.zeros_like(data), 1)
    layers = np.random.default_rng(0).integers(1, 255, (20, 12, 128), np.uint8)
    strided, other = on_gpu(layers), on_gpu(np.zeros_like(layers), 1)
    give, take = order(2500, 3000, 1), order(2500, 3000, 2)

    async def calls(pages: aiocomm.Pages, where: aiocomm.Pages, lists: Any, budget: int | None) -> list[int]:
        async with await b.lease_pages(where) as lease:
            before = [simulator.calls(name) for name in names]
            remote = a.remote_pages(lease.handle)
            await a.put_pages(pages, lists[0], remote, lists[1], sm_budget=budget)
            return [simulator.calls(name) - n for name, n in zip(names, before, strict=True)]

    assert await calls(ours, aiocomm.Pages(target), (give, take), 4) == [1, 0, 0]
    assert np.array_equal(target.numpy()[take], data[give])
    launches, batches, planes = await calls(ours, aiocomm.Pages(target), (give, take), None)
    assert (launches, planes) == (0, 0)
    assert 3 <= batches <= 10  # more, where there are cores for several threads
    rows = aiocomm.Pages(strided, page_axis=1), aiocomm.Pages(other, page_axis=1)
    assert await calls(*rows, ([3, 10, 0], [5, 0, 11]), 4) == [0, 0, 3]
    assert np.array_equal(other.numpy()[:, [5, 0, 11]], layers[:, [3, 10, 0]])


@pytest.mark.anyio
async def test_layers_are_gathered(pair: Pair) -> None:
    a, b = pair
    data = [blocks(40, 512, seed) for seed in range(4)]
    ours = aiocomm.Pages([on_gpu(one) for one in data])
    targets = [on_gpu(np.zeros_like(one), 1) for one in data]
    theirs = aiocomm.Pages(targets)
    async with await b.lease_pages(theirs, range(40)) as lease:
        remote = a.remote_pages(lease.handle)
        give, take = order(30, 40, 1), order(30, 40, 2)
        await a.put_layers(ours.layers(arrays=2), give, remote.layers(arrays=2), take, sm_budget=3)
        for target, one in zip(targets, data, strict=True):
            assert np.array_equal(target.numpy()[take], one[give])


@pytest.mark.anyio
async def test_what_fails_or_is_refused(simulator: Simulator, pair: Pair) -> None:
    a, b = pair
    data = blocks(100, 256)
    ours, target = aiocomm.Pages(on_gpu(data)), on_gpu(np.zeros_like(data), 1)
    give = order(100, 100, 1)
    async with await b.lease_pages(aiocomm.Pages(target)) as lease:
        remote = a.remote_pages(lease.handle)
        for wrong in (0, -1, "8", 1 << 32):
            with pytest.raises(aiocomm.UsageError, match="sm_budget"):
                await a.put_pages(ours, give, remote, range(100), sm_budget=wrong)  # type: ignore[arg-type]
        simulator.fail("cuLaunchKernel", 2)
        with pytest.raises(aiocomm.LinkError, match="OUT_OF_MEMORY"):
            await a.put_pages(ours, give, remote, range(100), sm_budget=8)
        await a.put_pages(ours, give, remote, range(100), sm_budget=8)
        assert np.array_equal(target.numpy(), data[give])
    on_host = np.zeros_like(data)
    async with await b.lease_pages(aiocomm.Pages(on_host)) as lease:
        await a.put_pages(ours, give, a.remote_pages(lease.handle), range(100), sm_budget=8)
        assert np.array_equal(on_host, data[give])


@pytest.mark.anyio
async def test_between_processes(gpu: Driver, anyio_backend_name: str) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("spawn's parent is the same on every loop: once is enough")
    simulates = simulated.choose() is not None

    async def work(comm: aiocomm.Communicator) -> None:
        import numpy as np
        from fakes.gpu import DeviceArray, driver

        from aiocomm.collectives import kernels

        if simulates:
            kernels.compiled = lambda source, architecture: source.encode() + b"\0"
        data = np.random.default_rng(0).integers(1, 255, (400, 3000), np.uint8)
        give, take = (np.random.default_rng(seed).permutation(400)[:300] for seed in (1, 2))
        mine = DeviceArray(data.shape, np.uint8, device=comm.rank % driver().count)
        mine.write(np.zeros_like(data) if comm.rank else data)
        if comm.rank == 0:
            remote = comm.remote_pages((await comm.recv_array(src=1)).tobytes())
            for _ in range(3):
                await comm.put_pages(aiocomm.Pages(mine), give, remote, take, sm_budget=8)
            await comm.send(b"x", 1)
            return
        async with await comm.lease_pages(aiocomm.Pages(mine)) as lease:
            await comm.send(np.frombuffer(lease.handle, np.uint8), 0)
            await comm.recv(bytearray(1), 0)
        assert np.array_equal(mine.numpy()[take], data[give])

    async with aiocomm.spawn(work, n=1, links=LINKS) as comm:
        await work(comm)


# ------------------------------------------------------------ the sources, as C++

HOST = """#include <cstdint>
#include <cstring>
#define __device__ static
#define __global__
#define __launch_bounds__(threads)
struct Three { unsigned x, y, z; };
static Three gridDim{1, 1, 1}, blockDim{1, 1, 1}, blockIdx{0, 0, 0}, threadIdx{0, 0, 0};
struct alignas(16) uint4 { unsigned x, y, z, w; };
static inline float __uint_as_float(unsigned x) { float f; std::memcpy(&f, &x, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned x; std::memcpy(&x, &f, 4); return x; }
extern "C" { unsigned misaligned; void __ubsan_handle_type_mismatch_v1(void*, void*) { ++misaligned; } }
"""
EVERY = """
  gridDim.x = blocks, blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
"""


def as_library(source: str, run: str, folder: Path) -> ctypes.CDLL:
    """Compile a kernel with a function that runs it by all of its threads; see `assert_aligned`."""
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("no C++ compiler")
    file, compiled, library = (folder / f"kernel.{kind}" for kind in ("cpp", "o", "so"))
    file.write_text(HOST + source + run)
    how = ["-O1", "-std=c++17", "-w", "-fPIC", "-fno-strict-aliasing", "-fsanitize=alignment"]
    subprocess.run([compiler, *how, "-c", "-o", compiled, file], check=True)
    subprocess.run([compiler, "-shared", "-o", library, compiled], check=True)  # with no sanitizer's library
    return ctypes.CDLL(str(library))


def assert_aligned(library: ctypes.CDLL) -> None:
    """Nothing was read or written where a GPU could not, as what it is told to be."""
    assert not ctypes.c_uint.in_dll(library, "misaligned").value


def test_the_gather_kernel_copies_every_byte_of_every_row(tmp_path: Path) -> None:
    run = (
        'extern "C" void run(const void* rows, size_type count, unsigned blocks, unsigned threads) {'
        + EVERY
        + "gather((const Row*)rows, count); }"
    )
    library = as_library(gather.SOURCE, run, tmp_path)
    rng = np.random.default_rng(0)
    for blocks_, threads in ((1, 32), (3, 64), (8, 512)):
        source = rng.integers(0, 255, 1 << 20, np.uint8)
        target = np.zeros_like(source)
        expected = np.zeros_like(source)
        rows, at = [], 0
        while at < len(source) - 20_000:
            nbytes = int(rng.choice([1, 3, 16, 100, 4096, 5000, 16_384]))
            skew = int(rng.choice([0, 0, 4, 1]))  # of the one against the other
            start = int(rng.integers(0, len(source) - nbytes - 16)) // 16 * 16
            rows.append((target.ctypes.data + at + skew, source.ctypes.data + start, nbytes))
            expected[at + skew : at + skew + nbytes] = source[start : start + nbytes]
            at = (at + skew + nbytes + 15) // 16 * 16
        table = np.array(rows, np.uint64)
        library.run(ctypes.c_void_p(table.ctypes.data), ctypes.c_uint64(len(rows)), blocks_, threads)
        assert np.array_equal(target, expected)
    assert_aligned(library)


@pytest.mark.parametrize(
    ("dtype", "count", "op", "by"),
    [
        (dtype, count, op, by)
        for dtype, count in (("float32", 1003), ("float32", 40_000), ("int8", 5001))
        for op, by in (("sum", 0), ("max", 0), ("sum", 3))
        if not by or dtype == "float32"  # means are of floats
    ],
)
def test_the_reduction_over_all_ranks(tmp_path: Path, dtype: str, count: int, op: str, by: int) -> None:
    size = 3
    run = (
        'extern "C" void run(const void* all, unsigned blocks, unsigned threads) {'
        + EVERY
        + "combine_all(*(const Arrays*)all); }"
    )
    library = as_library(kernels.kernel_source(dtype, op), run, tmp_path)
    for skew in (0, 1):  # elements by which one rank's array is off the others' alignment
        arrays = [np.random.default_rng(rank).integers(0, 9, count + 8).astype(dtype) for rank in range(size)]
        views = [array[skew * (rank == 1) :][:count] for rank, array in enumerate(arrays)]
        ufunc = np.add if op == "sum" else np.maximum
        expected = ufunc.reduce(np.stack(views), dtype=np.dtype(dtype))
        if by:
            expected = (expected / np.float32(by)).astype(dtype)
        places = [view.ctypes.data for view in views] + [0] * (16 - size)
        argument = np.array([*places, *places, count], np.uint64).tobytes()
        argument += np.array([size, by], np.uint32).tobytes()
        library.run(ctypes.c_char_p(argument), 2, 64)
        for view in views:
            np.testing.assert_array_equal(view, expected)


def test_it_compiles() -> None:
    assert_it_compiles(gather.SOURCE)

"""Reductions of GPU arrays, on every rank's GPU.

The simulated driver compiles nothing: it takes a kernel's source for a module, and computes what it says. The
kernels themselves run where there are GPUs, and are compiled wherever NVRTC is installed.
"""

from __future__ import annotations

import asyncio
import ctypes
import shutil
import subprocess
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes.gpu import DeviceArray, Driver, Stream, driver
from harness import LIMIT_S, all_call, world

import aiocomm
from aiocomm.collectives import kernels
from aiocomm.collectives.call import Call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu", "images")]

LINKS = ("shm", "cuda")
COUNTS = [1, 1003, (1 << 20) + 7]  # elements: the last is more than is reduced in one shot
COMPILED = kernels.compiled  # before a fixture puts something else there
DTYPES = ["f8", "f4", "f2", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]


@pytest.fixture
def anyio_backend() -> str:
    """One loop: what a call awaits is what the other collectives await, on all of them."""
    return "asyncio"


@pytest.fixture(params=[1, 2, 3, 4])
async def comms(request: pytest.FixtureRequest, gpu: Driver) -> AsyncIterator[list[aiocomm.Communicator]]:
    async with world(request.param, links=LINKS, warmup=True) as members:
        yield members


def block(rank: int, count: int, dtype: str = "f4") -> np.ndarray[Any, Any]:
    """Small whole numbers, whose sums and products of four are exact in every dtype."""
    return np.random.default_rng(rank).integers(1, 4, count, np.uint8).astype(dtype)


def on_gpu(rank: int, values: np.ndarray[Any, Any], **how: Any) -> DeviceArray:
    return DeviceArray(values.shape, values.dtype, device=rank % driver().count, **how).write(values)


def reduced(op: str, blocks: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    ufunc = {"sum": np.add, "mean": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}[op]
    with np.errstate(invalid="ignore"):
        total = ufunc.reduce(np.stack(blocks), dtype=blocks[0].dtype)
    return (total / total.dtype.type(len(blocks))).astype(total.dtype) if op == "mean" else total


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("algorithm", [None, "one_shot", "direct", "ring", "recursive_doubling"])
async def test_all_reduce(comms: list[aiocomm.Communicator], count: int, algorithm: str | None) -> None:
    size = len(comms)
    expected = reduced("sum", [block(rank, count) for rank in range(size)])

    async def call(comm: aiocomm.Communicator) -> None:
        x = on_gpu(comm.rank, block(comm.rank, count))
        out = on_gpu(comm.rank, np.zeros(count, "f4"))
        await comm.all_reduce(x, out=out, algorithm=algorithm)
        assert np.array_equal(out.numpy(), expected)
        assert np.array_equal(x.numpy(), block(comm.rank, count))
        await comm.all_reduce(x, algorithm=algorithm)
        assert np.array_equal(x.numpy(), expected)

    await all_call(comms, call)


@pytest.mark.parametrize("count", COUNTS)
async def test_reduce_and_reduce_scatter(comms: list[aiocomm.Communicator], count: int) -> None:
    size, root = len(comms), len(comms) - 1
    blocks = [block(rank, size * count) for rank in range(size)]
    expected = reduced("sum", blocks)

    async def call(comm: aiocomm.Communicator) -> None:
        rank = comm.rank
        x = on_gpu(rank, blocks[rank])
        mine = on_gpu(rank, np.zeros(count, "f4"))
        await comm.reduce_scatter(mine, x)
        assert np.array_equal(mine.numpy(), expected[rank * count : (rank + 1) * count])
        assert np.array_equal(x.numpy(), blocks[rank])
        await comm.reduce(x, root)
        if rank == root:
            assert np.array_equal(x.numpy(), expected)

    await all_call(comms, call)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_every_number_of_half_precision(gpu: Driver) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[~np.isnan(every)]
    others = [np.zeros_like(every), np.negative(every[::-1]), every]

    async def call(comm: aiocomm.Communicator) -> None:
        for other in others:
            blocks = [every, other]
            with np.errstate(invalid="ignore", over="ignore"):
                expected = (every.astype("f4") + other.astype("f4")).astype("f2")
            x = on_gpu(comm.rank, blocks[comm.rank])
            await comm.all_reduce(x)
            np.testing.assert_array_equal(x.numpy(), expected)

    async with world(2, links=LINKS, warmup=True) as comms:
        await all_call(comms, call)


@pytest.mark.parametrize("op", ["sum", "prod", "min", "max", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
async def test_operators_and_dtypes(gpu: Driver, dtype: str, op: str) -> None:
    async with world(3, links=LINKS, warmup=True) as comms:
        blocks = [block(rank, 100, dtype) for rank in range(3)]
        if op == "mean" and np.dtype(dtype).kind in "iu":

            async def refused(comm: aiocomm.Communicator) -> None:
                with pytest.raises(aiocomm.UsageError, match="floating dtype"):
                    await comm.all_reduce(on_gpu(comm.rank, blocks[comm.rank]), op)

            await all_call(comms, refused)
            return

        async def call(comm: aiocomm.Communicator) -> None:
            x = on_gpu(comm.rank, blocks[comm.rank])
            await comm.all_reduce(x, op)
            np.testing.assert_array_equal(x.numpy(), reduced(op, blocks))

        await all_call(comms, call)


class Tensor:
    """Names its dtype as torch does; float8 has no other name among GPU arrays."""

    __module__ = "torch"
    is_cuda = True

    def __init__(self, values: np.ndarray[Any, Any], device: int) -> None:
        self.memory = DeviceArray(values.shape, np.dtype("u1"), device=device).write(values.view("u1"))
        self.dtype = f"torch.{values.dtype.name}"
        self.shape, self.nbytes = values.shape, values.nbytes
        self.device = SimpleNamespace(index=device)
        self.__cuda_array_interface__ = self.memory.__cuda_array_interface__

    def is_contiguous(self) -> bool:
        return True

    def data_ptr(self) -> int:
        return self.memory.address


@pytest.mark.parametrize("op", ["sum", "prod", "min", "max", "mean"])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
async def test_float8_is_rounded_after_each_pair(gpu: Driver, name: str, op: str) -> None:
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name))
    codes = np.arange(256, dtype=np.uint8)  # every number with every other
    pairs = [np.repeat(codes, 256).view(dtype), np.tile(codes, 256).view(dtype)]
    async with world(2, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            x = Tensor(pairs[comm.rank], comm.rank % driver().count)
            await comm.all_reduce(x, op)
            got = x.memory.numpy().view(dtype).astype("f4")
            wide = [one.astype("f4") for one in pairs]
            with np.errstate(all="ignore"):
                total = reduced("sum" if op == "mean" else op, wide).astype(dtype).astype("f4")
                wanted = (total / 2).astype(dtype).astype("f4") if op == "mean" else total
            np.testing.assert_array_equal(got, wanted)

        await all_call(comms, call)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_the_kernels_float8_is_that_of_ml_dtypes(name: str, tmp_path: Path) -> None:
    """The same source, compiled for the host: every code, and numbers of every exponent beside every tie."""
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name))
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "float8.cpp"
    library = tmp_path / "float8.so"
    source.write_text(
        """#include <cstring>
        #define __device__ static
        static float __uint_as_float(unsigned x) { float f; std::memcpy(&f, &x, 4); return f; }
        static unsigned __float_as_uint(float f) { unsigned x; std::memcpy(&x, &f, 4); return x; }
        """
        + kernels.kernel_source(name, "sum").partition("__device__ value_t load")[0]
        + """
        extern "C" void loads(const stored_t* in, value_t* out, size_type n) {
          for (size_type i = 0; i < n; ++i) out[i] = float8_load(in[i]);
        }
        extern "C" void saves(const value_t* in, stored_t* out, size_type n) {
          for (size_type i = 0; i < n; ++i) out[i] = float8_save(in[i]);
        }
        """
    )
    subprocess.run([compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-o", library, source], check=True)
    functions = ctypes.CDLL(str(library))

    def converted(function: Any, given: Any, out: Any) -> Any:
        function(
            ctypes.c_void_p(given.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_uint64(len(given))
        )
        return out

    codes = np.arange(256, dtype=np.uint8)
    loaded = converted(functions.loads, codes, np.empty(256, "f4"))
    wanted = codes.view(dtype).astype("f4")
    np.testing.assert_array_equal(loaded, wanted)
    assert np.array_equal(np.signbit(loaded), np.signbit(wanted))
    some = np.arange(1 << 13, dtype=np.uint32) << 19  # sign, exponent, and four bits of the mantissa
    numbers = np.concatenate([some - 1, some, some + 1]).view("f4").copy()
    saved = converted(functions.saves, numbers, np.empty(len(numbers), np.uint8))
    with np.errstate(all="ignore"):
        wanted = numbers.astype(dtype).astype("f4")
    np.testing.assert_array_equal(saved.view(dtype).astype("f4"), wanted)


async def test_what_is_not_a_number_stays_so(gpu: Driver) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:
        values = [np.array([np.nan, 1, np.inf], "f4"), np.array([1, np.nan, -np.inf], "f4")]

        async def call(comm: aiocomm.Communicator) -> None:
            for op in ("min", "max", "sum"):
                x = on_gpu(comm.rank, values[comm.rank])
                await comm.all_reduce(x, op)
                np.testing.assert_array_equal(x.numpy(), reduced(op, values))

        await all_call(comms, call)


async def test_work_on_the_users_stream_is_waited_for(gpu: Driver) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:
        streams = [Stream(device=rank % driver().count) for rank in range(2)]
        arrays = [on_gpu(rank, np.full(300, 9, "u1")) for rank in range(2)]
        gates = [stream.gate() for stream in streams]
        for stream, array, rank in zip(streams, arrays, range(2), strict=True):
            stream.fill(array, rank + 1)
        calls = [
            comm.all_reduce(array, stream=stream)
            for comm, array, stream in zip(comms, arrays, streams, strict=True)
        ]
        ended = anyio.Event()

        async def run(call: Any) -> None:
            await call
            ended.set()

        with anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as tasks:
                for one in calls:
                    tasks.start_soon(run, one)
                for _ in range(50):
                    await anyio.lowlevel.checkpoint()
                assert not ended.is_set()
                for gate in gates:
                    gate.open()
        for array in arrays:
            assert np.array_equal(array.numpy(), np.full(300, 3, "u1"))
        for stream in streams:
            stream.close()


async def test_what_cannot_be_is_refused_on_all_ranks(gpu: Driver) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:

        async def every(match: str, **how: Any) -> None:
            async def call(comm: aiocomm.Communicator) -> None:
                x = on_gpu(comm.rank, np.ones(8, how.get("dtype", "f4")))
                out = np.ones(8, "f4") if how.get("on_host") else None
                with pytest.raises(aiocomm.UsageError, match=match):
                    await comm.all_reduce(x, how.get("op", "sum"), out=out, sm_budget=how.get("sm_budget"))

            await all_call(comms, call)

        await every("unknown reduction 'median'", op="median")
        await every("cannot reduce GPU arrays of dtype bool", dtype="?")
        await every("sm_budget=0", sm_budget=0)
        await every("one on a GPU", on_host=True)


async def test_without_nvrtc_the_error_says_what_to_install(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(source: str, architecture: str) -> bytes:
        raise aiocomm.UsageError("NVRTC is not there: pip install")

    async with world(2, links=LINKS, warmup=True) as comms:
        monkeypatch.setattr(kernels, "compiled", missing)
        kernels.kernels_of.cache_clear()

        async def call(comm: aiocomm.Communicator) -> None:
            with pytest.raises(aiocomm.UsageError, match="pip install"):
                await comm.all_reduce(on_gpu(comm.rank, np.ones(8, "f4")))

        await all_call(comms, call)
    kernels.kernels_of.cache_clear()


def assert_it_compiles(source: str) -> None:
    """NVRTC makes images of it; skips where there is none."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-python is not installed")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError:
        pytest.skip("NVRTC is not installed")
    for architecture in ("sm_80", "sm_90"):
        assert COMPILED(source, architecture).startswith(b"\x7fELF")


@pytest.mark.parametrize("op", ["sum", "prod", "min", "max"])
@pytest.mark.parametrize("dtype", kernels.types())
def test_kernels_compile(dtype: str, op: str) -> None:
    assert_it_compiles(kernels.kernel_source(dtype, op))


async def test_memory_of_calls_that_grow_is_not_kept_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is large enough serves them all; the sizes before it would add up to their square."""
    alive: dict[int, int] = {}
    make, end = kernels.Scratch.__init__, kernels.Scratch.__del__

    def made(memory: kernels.Scratch, of: kernels.Kernels, nbytes: int) -> None:
        make(memory, of, nbytes)
        alive[id(memory)] = nbytes

    def ended(memory: kernels.Scratch) -> None:
        alive.pop(id(memory), None)
        end(memory)

    monkeypatch.setattr(kernels.Scratch, "__init__", made)
    monkeypatch.setattr(kernels.Scratch, "__del__", ended)
    async with world(2, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            for count in [1 << 18, 1 << 19, 3 << 18, 1 << 20, 1 << 19]:
                x = on_gpu(comm.rank, block(comm.rank, count))
                await comm.all_reduce(x, algorithm="ring")

        await all_call(comms, call)
        assert len(alive) == 2
        scope = comms[0]._members()._scope(None)
        ((device, (kept,)),) = scope._device_spare.items()
        many = [kernels.Scratch(kept._kernels, nbytes << 20) for nbytes in (40, 70, 20)]
        for memory in many:
            scope.give_back_device(memory)
        assert scope._device_spare[device] == [many[1]]
        del many, memory, kept
    assert not alive


async def test_a_call_that_is_cancelled_again_waits_for_its_kernels(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their memory is given back then, and the arrays are the caller's again."""
    waited: list[int] = []
    give_up, synchronize = Call._give_up, kernels.Kernels.synchronize

    async def cancelled_again(call: Call, error: BaseException) -> None:
        await give_up(call, error)
        raise asyncio.CancelledError

    def fails(call: Call) -> bool:
        assert call._launched
        raise RuntimeError("after its kernels were launched")

    def counted(of: kernels.Kernels) -> None:
        waited.append(of.device)
        synchronize(of)

    async def call(comm: aiocomm.Communicator) -> None:
        with pytest.raises(asyncio.CancelledError):
            await comm.all_reduce(on_gpu(comm.rank, block(comm.rank, 1003)), algorithm="ring")

    async with world(2, links=LINKS, warmup=True) as members:
        monkeypatch.setattr(Call, "_give_up", cancelled_again)
        monkeypatch.setattr(Call, "_prove", fails)
        monkeypatch.setattr(kernels.Kernels, "synchronize", counted)
        await all_call(members, call)
        assert len(waited) == 2
        monkeypatch.undo()

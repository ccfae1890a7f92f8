"""GPU arrays that have DLPack only, cuda.core's buffers among them."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes import simulated
from fakes.gpu import DeviceArray, Driver, Handle, Stream, driver
from harness import world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import Pair

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]


class ManagedTensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class ByDlpack:
    """A GPU array of float32 that has DLPack and nothing else."""

    def __init__(
        self, memory: DeviceArray, shape: tuple[int, ...], strides: tuple[int, ...] | None = None
    ) -> None:
        self._memory, self._shape, self._strides = memory, shape, strides
        self.streams: list[int | None] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._memory.device

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        self.streams.append(stream)
        ndim = len(self._shape)
        dims = (ctypes.c_int64 * ndim)(*self._shape)
        steps = (ctypes.c_int64 * ndim)(*self._strides) if self._strides else None
        self._kept = (dims, steps)
        self._tensor = ManagedTensor(
            self._memory.address - 4, 2, self._memory.device, ndim, 2, 32, 1, dims, steps, 4
        )
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self._tensor), b"dltensor", None)


@pytest.fixture
async def pair(gpu: Driver) -> AsyncIterator[Pair]:
    """Ranks 0 and 1, with GPU memory."""
    async with world(2, links=("shm", "cuda"), warmup=True) as (a, b):
        yield a, b


async def both(*transfers: Any) -> list[Any]:
    return [await transfer for transfer in transfers]


async def test_dlpack_both_ways(pair: Pair) -> None:
    a, b = pair
    data = np.arange(24, dtype=np.float32).reshape(4, 6)
    source = ByDlpack(DeviceArray((4, 6), np.float32, device=0).write(data), (4, 6))
    target = DeviceArray((4, 6), np.float32, device=1)
    await both(a.send(source, 1), b.recv(ByDlpack(target, (24,)), 0))
    assert (target.numpy() == data).all()
    assert source.streams == [1]  # its library has that one wait for what it has queued, as the transfer does
    _, made = await both(a.send(source, 1), b.recv_array(0))
    assert made.dtype == np.float32
    assert (np.asarray(made) == data).all()


async def test_dlpack_strides(pair: Pair) -> None:
    a, b = pair
    memory = DeviceArray((4, 6), np.float32).write(np.ones((4, 6)))
    host = np.zeros((4, 6), np.float32)
    await both(a.send(ByDlpack(memory, (4, 6), (6, 1)), 1), b.recv(host, 0))
    assert host.all()
    with pytest.raises(aiocomm.UsageError, match="not contiguous"):
        a.send(ByDlpack(memory, (6, 4), (1, 6)), 1)


class Queued(ByDlpack):
    """Of a library that has work on a stream of its own, for which no other waits."""

    def __init__(self, memory: DeviceArray, stream: Stream) -> None:
        super().__init__(memory, memory.shape)
        self._stream = stream

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        if stream != -1:
            event = Handle()
            driver().use(self._memory.device)
            driver()("cuEventCreate", ctypes.byref(event), 2)
            driver()("cuEventRecord", event, Handle(self._stream.handle))
            driver()("cuStreamWaitEvent", Handle(stream), event, 0)
            driver()("cuEventDestroy", event)
        return super().__dlpack__(stream=stream)


@pytest.mark.parametrize("named", [False, True])
async def test_work_of_a_library_with_dlpack_is_waited_for(pair: Pair, named: bool) -> None:
    a, b = pair
    stream, other = Stream(), Stream()
    memory, into = DeviceArray(1024, np.float32), DeviceArray(4096, device=1)
    gate = stream.gate()
    stream.fill(memory, 7)
    received = b.recv(into, 0)
    sent = a.send(Queued(memory, stream), 1, stream=other if named else None)
    await both(a.send(b"x", 1, tag=1), b.recv(bytearray(1), 0, tag=1))
    assert not sent.done()
    gate.open()
    await both(sent, received)
    assert (into.numpy() == 7).all()
    for one in (stream, other):
        one.close()


async def test_what_cannot_be_exported_says_so(pair: Pair) -> None:
    a, _ = pair

    class Refusing(ByDlpack):
        def __dlpack__(self, *, stream: int | None = None) -> Any:
            raise BufferError("requires grad")

    with pytest.raises(aiocomm.UsageError, match="requires grad"):
        a.send(Refusing(DeviceArray(16), (4,)), 1)


@pytest.mark.parametrize("native", [True, False])
async def test_an_interface_may_say_that_nothing_is_queued(pair: Pair, native: bool) -> None:
    """By `stream: None`."""

    class Exported:
        def __init__(self, array: DeviceArray) -> None:
            interface = array.__cuda_array_interface__ | {"stream": None}
            # What is not contiguous at first sight is read in Python.
            self.__cuda_array_interface__ = interface if native else interface | {"strides": (1,)}
            self.array = array

    a, b = pair
    stream, busy = Stream(), DeviceArray(1)
    source = DeviceArray(4096, stream=stream.handle).write(np.full(4096, 7, np.uint8))
    into, waits = DeviceArray(4096, stream=stream.handle), DeviceArray(4096, stream=stream.handle)
    await both(a.send(Exported(source), 1), b.recv(Exported(into), 0))
    gate = stream.gate()
    stream.fill(busy, 1)
    into_later = b.recv(waits, 0, tag=1)
    later = a.send(source, 1, tag=1)
    await both(a.send(Exported(source), 1), b.recv(Exported(into), 0))
    assert not stream.done()
    assert not into_later.done()
    gate.open()
    await both(later, into_later)
    assert (into.numpy() == 7).all()
    assert (waits.numpy() == 7).all()
    stream.close()


class Current:
    """An array of a library whose current stream is each thread's own, as torch's and CuPy's are."""

    def __init__(self, array: DeviceArray) -> None:
        self._array, self.streams = array, threading.local()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self._array.__cuda_array_interface__ | {"stream": getattr(self.streams, "current", 1)}


@pytest.mark.parametrize(
    ("current", "named", "submitted"), [(5, None, 5), (5, 7, 7), (2, None, 0), (5, 2, 0), (None, None, None)]
)
async def test_the_current_stream_is_that_of_the_calling_thread(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, current: int | None, named: int | None, submitted: int | None
) -> None:
    """By from_thread; a thread's own default stream is waited for by the legacy one."""
    a, b = pair
    array, options = Current(DeviceArray(16)), [] if named is None else [("stream", named)]
    region = b.register(DeviceArray(16))
    remote = a.remote(region.handle)
    seen: list[Any] = []

    def look(*_: Any, stream: Any = None, **__: Any) -> None:
        seen.append(stream)
        raise aiocomm.UsageError("seen")

    def call() -> None:
        array.streams.current = current
        comm, more = a.from_thread, dict(options)
        calls: list[Callable[[], Any]] = [
            lambda: comm.send(array, 1, **more),
            lambda: comm.recv(array, 1, **more),
            lambda: comm.put(array, remote, **more),
            lambda: comm.get(remote, array, **more),
        ]
        for one in calls:
            with pytest.raises(aiocomm.UsageError, match="seen"):
                one()

    for method in ("send", "recv", "put", "get"):
        monkeypatch.setattr(aiocomm.Communicator, method, look)
    await anyio.to_thread.run_sync(call)
    assert seen == [submitted] * 4
    await region.aclose()


async def test_gpu_arrays_of_other_threads(pair: Pair) -> None:
    a, b = pair
    stream, source, into = Stream(), DeviceArray(4096), DeviceArray(4096, device=1)
    gate = stream.gate()
    stream.fill(source, 7)
    host = np.zeros(4096, np.uint8)
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, lambda: a.from_thread.send(source, 1, stream=stream))
        group.start_soon(anyio.to_thread.run_sync, lambda: b.from_thread.recv(into, 0))
        gate.open()
    assert (into.numpy() == 7).all()
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, lambda: a.from_thread.send(source, 1))
        group.start_soon(anyio.to_thread.run_sync, lambda: b.from_thread.recv(host, 0))
    assert (host == 7).all()
    with pytest.raises(aiocomm.UsageError, match="stream= belongs"):
        await anyio.to_thread.run_sync(lambda: a.from_thread.send(host, 1, stream=0))
    stream.close()


def test_buffers_of_cuda_core() -> None:
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        pytest.skip("cuda.core is not installed")
    program = """
import sys, warnings
warnings.simplefilter("ignore")
from cuda.core import Buffer, Device
from fakes.gpu import DeviceArray
from aiocomm._device import describe
device = Device(0); device.set_current()
memory = DeviceArray(4096)
buffer = Buffer.from_handle(memory.address, 4096)
try:
    kind = buffer.__dlpack_device__()
except Exception as error:
    print("skipped:", type(error).__name__, error); sys.exit()
owner, address, nbytes, index, stream, form, shape = describe(buffer, False, device.create_stream())
assert (address, nbytes, index) == (memory.address, 4096, 0), (address, nbytes, index)
assert stream > 2
print("described")
"""
    environment = {}
    if (library := simulated.choose()) is not None:
        environment = {"LD_LIBRARY_PATH": str(library.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("skipped"):
        pytest.skip(done.stdout.strip())
    assert done.stdout.strip() == "described"

"""What the GPU suite asks of the driver, by ctypes: memory, streams, raw copies between two processes."""

from __future__ import annotations

import ctypes
import math
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LIBRARY = "libcuda.so.1"
_LAZY_PEER_ACCESS = 1
_PORTABLE = 1
_NON_BLOCKING = 1
_NO_TIMING = 2
_UNIFIED = 4
_IN_STREAM_ORDER, _OVERLAP = 1, 1


class Driver:
    """The driver, with one device's primary context current on the thread that made it."""

    def __init__(self, device: int) -> None:
        self._library = ctypes.CDLL(os.environ.get("AIOCOMM_LIBCUDA") or LIBRARY)
        self("cuInit", 0)
        self.device = device
        context = ctypes.c_void_p()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)

    def __call__(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise OSError(f"{name} gives {code}")

    def count(self) -> int:
        """Devices that this process sees."""
        count = ctypes.c_int()
        self("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def allocate(self, nbytes: int) -> Memory:
        """Device memory by cuMemAlloc, filled with ones."""
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        memory = Memory(self, address.value, nbytes)
        memory.fill(1)
        return memory

    def pinned(self, nbytes: int) -> int:
        """Address of host memory that the device reaches by itself."""
        address = ctypes.c_void_p()
        self("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes), _PORTABLE)
        return address.value or 0

    def call(self, name: str, *arguments: Any) -> Callable[[], int]:
        """One of the driver's functions with its arguments bound, to be timed."""
        function = getattr(self._library, name)
        return lambda: int(function(*arguments))

    def stream(self) -> ctypes.c_void_p:
        """A stream of its own."""
        stream = ctypes.c_void_p()
        self("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return stream

    def copy(self, to: int, source: int, nbytes: int, stream: ctypes.c_void_p) -> None:
        """Queue a copy."""
        self("cuMemcpyAsync", ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(nbytes), stream)

    def write(self, word: int, stream: ctypes.c_void_p) -> None:
        """Queue that a word of pinned memory becomes 1."""
        self("cuStreamWriteValue32_v2", stream, ctypes.c_uint64(word), ctypes.c_uint32(1), 0)

    def copy_rows(
        self, to: tuple[int, int], source: tuple[int, int], nbytes: int, rows: int, stream: ctypes.c_void_p
    ) -> None:
        """Queue a 2-D copy: `to` and `source` are an address and the bytes from a row to the next."""
        plan = _Plane(srcType=_UNIFIED, dstType=_UNIFIED, width=nbytes, height=rows)
        plan.dstDevice, plan.dstPitch = to
        plan.srcDevice, plan.srcPitch = source
        self("cuMemcpy2DAsync_v2", ctypes.byref(plan), stream)

    def batch(
        self, to: Sequence[int], source: Sequence[int], nbytes: int, stream: ctypes.c_void_p
    ) -> Callable[[], None]:
        """Make a function that queues many copies of one size by one call, as CUDA 12.8 has it."""
        count = len(to)
        kind = _Attributes(order=_IN_STREAM_ORDER, flags=_OVERLAP)
        arguments = (
            (ctypes.c_uint64 * count)(*to),
            (ctypes.c_uint64 * count)(*source),
            (ctypes.c_size_t * count)(*[nbytes] * count),
            ctypes.c_size_t(count),
            ctypes.byref(kind),
            ctypes.byref(ctypes.c_size_t(0)),
            ctypes.c_size_t(1),
            ctypes.byref(ctypes.c_size_t(0)),
            stream,
        )
        return lambda: self("cuMemcpyBatchAsync", *arguments)

    def wait(self, stream: ctypes.c_void_p) -> None:
        """Wait for a stream."""
        self("cuStreamSynchronize", stream)

    def open(self, handle: bytes) -> int:
        """Map another process's allocation with this device's context, with peer access."""
        address = ctypes.c_uint64()
        packed = _Handle.from_buffer_copy(handle)
        self("cuIpcOpenMemHandle_v2", ctypes.byref(address), packed, _LAZY_PEER_ACCESS)
        return address.value

    def close(self, address: int) -> None:
        """Drop what `open` has mapped."""
        self("cuIpcCloseMemHandle", ctypes.c_uint64(address))


def missing() -> str:
    """What two GPUs are missing for; empty: nothing."""
    try:
        return "" if Driver(0).count() > 1 else "needs two GPUs"
    except (AttributeError, OSError) as error:
        return f"no GPU: {error}"


class Kernel:
    """A kernel that does nothing, so that what a launch costs is all there is."""

    _SOURCE = b".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry nothing() { ret; }\n\0"

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        driver("cuModuleLoadData", ctypes.byref(module), self._SOURCE)
        driver("cuModuleGetFunction", ctypes.byref(self._function), module, b"nothing")

    def launcher(self, stream: ctypes.c_void_p) -> Callable[[], int]:
        """A function that launches it once."""
        one, zero, none = ctypes.c_uint(1), ctypes.c_uint(0), ctypes.c_void_p()
        arguments = (self._function, one, one, one, one, one, one, zero, stream, none, none)
        launch = self._driver._library.cuLaunchKernel
        return lambda: int(launch(*arguments))


class _Plane(ctypes.Structure):  # CUDA_MEMCPY2D
    _fields_ = (
        *(
            (side + name, ctypes.c_uint if name == "Type" else ctypes.c_uint64)
            for side in ("src", "dst")
            for name in ("XInBytes", "Y", "Type", "Host", "Device", "Array", "Pitch")
        ),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class _Attributes(ctypes.Structure):  # CUmemcpyAttributes
    _fields_ = (("order", ctypes.c_int), ("hints", ctypes.c_int * 4), ("flags", ctypes.c_uint))


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


class Memory:
    """An allocation; slices share it. What aiocomm takes as a GPU array."""

    def __init__(
        self, driver: Driver, address: int, nbytes: int, shape: tuple[int, ...] | None = None
    ) -> None:
        self.driver, self.address, self.nbytes = driver, address, nbytes
        self.shape = shape or (nbytes,)
        # Made once, as by libraries whose arrays are native: what is measured is not the making of a dict.
        self.__cuda_array_interface__ = {
            "shape": self.shape,
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": None,  # nothing is queued that raw copies would wait for, either
        }

    def shaped(self, *shape: int) -> Memory:
        """The first bytes of it, with another shape."""
        return Memory(self.driver, self.address, math.prod(shape), shape)

    def __getitem__(self, part: slice) -> Memory:
        start, stop, _ = part.indices(self.nbytes)
        return Memory(self.driver, self.address + start, stop - start)

    def handle(self) -> bytes:
        """For another process to open."""
        packed = _Handle()
        self.driver("cuIpcGetMemHandle", ctypes.byref(packed), ctypes.c_uint64(self.address))
        return bytes(packed)

    def fill(self, value: int) -> None:
        """Set every byte, and wait for it."""
        size = ctypes.c_size_t(self.nbytes)
        self.driver("cuMemsetD8Async", ctypes.c_uint64(self.address), ctypes.c_ubyte(value), size, None)
        self.driver("cuCtxSynchronize")

    def write(self, offset: int, data: bytes) -> None:
        """Bytes of host memory into a part of it."""
        where, size = ctypes.c_uint64(self.address + offset), ctypes.c_size_t(len(data))
        self.driver("cuMemcpyHtoD_v2", where, data, size)

    def read(self, offset: int, nbytes: int) -> bytes:
        """A part of it, in host memory."""
        out = ctypes.create_string_buffer(nbytes)
        self.driver("cuMemcpyDtoH_v2", out, ctypes.c_uint64(self.address + offset), ctypes.c_size_t(nbytes))
        return out.raw

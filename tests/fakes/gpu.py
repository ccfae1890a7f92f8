"""Device memory for tests, over the driver in use: NVIDIA's where there is a GPU, else the simulated one.

`driver()` loads what AIOCOMM_LIBCUDA names, else libcuda.so.1, by ctypes: no array library is needed. A
`DeviceArray` is what aiocomm takes: an object with `__cuda_array_interface__`.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import gc
import os
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import DTypeLike, NDArray

__all__ = ["DeviceArray", "Driver", "DriverError", "Kind", "Stream", "driver"]

_GRANULARITY: Final = 2 << 20
_CAPTURE_RELAXED: Final = 2

# Names whose present form has a suffix: ctypes finds what is exported, not what cuda.h calls it.
_SUFFIXED: Final = {
    **dict.fromkeys(
        (
            "cuCtxPopCurrent",
            "cuCtxPushCurrent",
            "cuDevicePrimaryCtxRelease",
            "cuDeviceTotalMem",
            "cuEventDestroy",
            "cuIpcOpenMemHandle",
            "cuMemAlloc",
            "cuMemFree",
            "cuMemGetAddressRange",
            "cuMemGetInfo",
            "cuMemHostRegister",
            "cuMemcpy2DAsync",
            "cuMemcpyDtoH",
            "cuMemcpyDtoHAsync",
            "cuMemcpyHtoD",
            "cuMemcpyHtoDAsync",
            "cuStreamBeginCapture",
            "cuStreamDestroy",
            "cuStreamWaitValue32",
            "cuStreamWriteValue32",
        ),
        "_v2",
    ),
}

Address = ctypes.c_uint64
Handle = ctypes.c_void_p


class Kind(enum.StrEnum):
    """Where a test's device memory comes from."""

    MALLOC = "malloc"  # cudaMalloc: torch's and CuPy's default pools
    VMM = "vmm"  # torch's expandable segments
    POOL = "pool"  # cudaMallocAsync
    MANAGED = "managed"
    PINNED = "pinned"


class DriverError(Exception):
    """A call of the driver failed."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call} gives {name} ({code})")
        self.code = code


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class AllocationProp(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("unused", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


class AccessDesc(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class Driver:
    """The driver, with one primary context per device; calls raise `DriverError`."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.contexts: dict[int, Handle] = {}
        self("cuInit", ctypes.c_uint(0))
        count = ctypes.c_int()
        self("cuDeviceGetCount", ctypes.byref(count))
        self.count = count.value

    def code(self, name: str, *arguments: Any) -> int:
        """Call an entry point; returns its CUresult."""
        return int(getattr(self.library, name + _SUFFIXED.get(name, ""))(*arguments))

    def __call__(self, name: str, *arguments: Any) -> None:
        code = self.code(name, *arguments)
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(code, ctypes.byref(text))
            raise DriverError(name, code, (text.value or b"?").decode())

    def use(self, device: int) -> None:
        """Make a device's primary context current on this thread, as CUDA's runtime does."""
        device %= self.count
        if device not in self.contexts:
            context = Handle()
            self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self.contexts[device] = context
        self("cuCtxSetCurrent", self.contexts[device])

    def synchronize(self, device: int) -> None:
        """Wait for all that is queued on a device."""
        self.use(device)
        self("cuCtxSynchronize")


@functools.cache
def driver() -> Driver:
    """The driver of this process, loaded once."""
    return Driver(os.environ.get("AIOCOMM_LIBCUDA") or "libcuda.so.1")


class Stream:
    """A stream of its own; `__cuda_stream__` makes it one for any library."""

    def __init__(self, device: int = 0, blocking: bool = False) -> None:
        self.device = device % driver().count
        driver().use(self.device)
        handle = Handle()
        driver()("cuStreamCreate", ctypes.byref(handle), 0 if blocking else 1)
        self.handle = handle.value or 0
        self._gates: list[Gate] = []

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

    def gate(self) -> Gate:
        """Queue a stand-in for a long kernel: what follows waits until the gate is opened."""
        gate = Gate(self)
        self._gates.append(gate)
        return gate

    def fill(self, array: DeviceArray, value: int) -> None:
        """Queue that every byte of an array becomes `value`."""
        driver().use(self.device)
        driver()(
            "cuMemsetD8Async",
            Address(array.address),
            value,
            ctypes.c_size_t(array.nbytes),
            Handle(self.handle),
        )

    def done(self) -> bool:
        """Whether all that was queued has ended."""
        driver().use(self.device)
        return driver().code("cuStreamQuery", Handle(self.handle)) == 0

    def synchronize(self) -> None:
        """Wait for what is queued."""
        driver().use(self.device)
        driver()("cuStreamSynchronize", Handle(self.handle))

    def begin_capture(self, mode: int = _CAPTURE_RELAXED) -> None:
        """Record instead of executing, until `end_capture`. `mode` 0 is global, which torch uses."""
        driver().use(self.device)
        driver()("cuStreamBeginCapture", Handle(self.handle), mode)

    def end_capture(self) -> int:
        """Throw the recording away; returns the driver's code."""
        driver().use(self.device)
        graph = Handle()
        code = driver().code("cuStreamEndCapture", Handle(self.handle), ctypes.byref(graph))
        if graph:
            driver()("cuGraphDestroy", graph)
        return code

    def close(self) -> None:
        """Open the gates, wait, destroy. Once."""
        if self.handle:
            for gate in self._gates:
                gate.open()
            driver().use(self.device)
            driver().code("cuStreamSynchronize", Handle(self.handle))  # of a broken context, too
            driver()("cuStreamDestroy", Handle(self.handle))
            self.handle = 0


class Gate:
    """A word in pinned memory that a stream waits for."""

    shut: ClassVar[set[object]] = set()  # those that are not open, and engines that a test holds up
    late: ClassVar[list[Callable[[], None]]] = []  # what waits for them to open

    def __init__(self, stream: Stream) -> None:
        self.settle()
        self._memory = DeviceArray(1, np.uint32, stream.device, Kind.PINNED)
        self._memory.numpy()[0] = 0
        driver()(
            "cuStreamWaitValue32",
            Handle(stream.handle),
            Address(self._memory.address),
            ctypes.c_uint32(1),
            1,  # CU_STREAM_WAIT_VALUE_EQ
        )
        self.shut.add(id(self))

    def open(self) -> None:
        """Let the stream go on."""
        self._memory.numpy()[0] = 1
        self.opened(id(self))

    @classmethod
    def settle(cls) -> None:
        """Before anything is shut: what is given back behind it would hold up who has to go on."""
        if not cls.shut:
            gc.collect()
            assert _core.given_back(10)

    @classmethod
    def opened(cls, which: object) -> None:
        """One of `shut` no longer is."""
        cls.shut.discard(which)
        while not cls.shut and cls.late:
            cls.late.pop()()


class DeviceArray:
    """A contiguous array in device memory (or, of kind PINNED, in the driver's host memory).

    Args:
        shape: of the array.
        dtype: of its elements.
        device: on whose memory; after the last comes the first again.
        kind: how it is allocated.
        offset: bytes between the allocation's start and the array's.
        stream: what `__cuda_array_interface__` names as the stream of pending work.

    Memory goes back by `close()`, or with the object.
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        dtype: DTypeLike = np.uint8,
        device: int = 0,
        kind: Kind = Kind.MALLOC,
        offset: int = 0,
        stream: int | None = None,
    ) -> None:
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.dtype = np.dtype(dtype)
        self.device = device % driver().count
        self.kind, self.offset, self.stream = kind, offset, stream
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        self._room = max(1, self.nbytes + offset)
        self._vmm = (ctypes.c_uint64(), 0)
        driver().use(self.device)
        self._base = getattr(self, f"_allocate_{kind.value}")()
        self.address = self._base + offset

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.kind is Kind.PINNED:
            raise AttributeError("host memory")
        interface = {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }
        return interface if self.stream is None else interface | {"stream": self.stream}

    def _allocate_malloc(self) -> int:
        address = Address()
        driver()("cuMemAlloc", ctypes.byref(address), ctypes.c_size_t(self._room))
        return address.value

    def _allocate_managed(self) -> int:
        address = Address()
        driver()("cuMemAllocManaged", ctypes.byref(address), ctypes.c_size_t(self._room), 1)
        return address.value

    def _allocate_pool(self) -> int:
        address = Address()
        driver()("cuMemAllocAsync", ctypes.byref(address), ctypes.c_size_t(self._room), None)
        driver()("cuStreamSynchronize", None)
        return address.value

    def _allocate_pinned(self) -> int:
        address = ctypes.c_void_p()
        driver()("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(self._room), 1)
        return address.value or 0

    def _allocate_vmm(self) -> int:
        # In blocks, as expandable segments are: an array may lie across several.
        size = -(-self._room // _GRANULARITY) * _GRANULARITY
        address = Address()
        driver()(
            "cuMemAddressReserve",
            ctypes.byref(address),
            ctypes.c_size_t(size),
            ctypes.c_size_t(0),
            Address(0),
            Address(0),
        )
        place = Location(1, self.device)
        for at in range(address.value, address.value + size, _GRANULARITY):
            block = ctypes.c_uint64()
            wanted = AllocationProp(1, 1, place, None, 0)
            driver()(
                "cuMemCreate",
                ctypes.byref(block),
                ctypes.c_size_t(_GRANULARITY),
                ctypes.byref(wanted),
                Address(0),
            )
            driver()(
                "cuMemMap", Address(at), ctypes.c_size_t(_GRANULARITY), ctypes.c_size_t(0), block, Address(0)
            )
            driver()("cuMemRelease", block)  # the mapping keeps it
        access = AccessDesc(place, 3)
        driver()("cuMemSetAccess", address, ctypes.c_size_t(size), ctypes.byref(access), ctypes.c_size_t(1))
        self._vmm = (address, size)
        return address.value

    def part(self, start: int, nbytes: int) -> Part:
        """Bytes of this array, as an array."""
        return Part(self, start, nbytes)

    def write(self, values: NDArray[Any]) -> DeviceArray:
        """Copy from the host, and wait for it."""
        source = np.ascontiguousarray(values, self.dtype).reshape(-1)
        if source.nbytes != self.nbytes:
            raise ValueError(f"{source.nbytes} bytes for an array of {self.nbytes}")
        if self.kind is Kind.PINNED:
            self.numpy().reshape(-1)[:] = source
        elif self.nbytes:
            driver().use(self.device)
            driver()(
                "cuMemcpyHtoD",
                Address(self.address),
                Handle(source.ctypes.data),
                ctypes.c_size_t(self.nbytes),
            )
        return self

    def numpy(self) -> NDArray[Any]:
        """The array in host memory: of pinned memory a view, else a copy of what it holds now."""
        if self.kind is Kind.PINNED:
            view = (ctypes.c_char * self.nbytes).from_address(self.address)
            return np.frombuffer(view, self.dtype).reshape(self.shape)
        target = np.empty(self.shape, self.dtype)
        if self.nbytes:
            driver().use(self.device)
            driver()(
                "cuMemcpyDtoH",
                Handle(target.ctypes.data),
                Address(self.address),
                ctypes.c_size_t(self.nbytes),
            )
        return target

    def close(self) -> None:
        """Give the memory back. Once."""
        base, self._base = self._base, 0
        if base:
            _free(base, self.device, self.kind, self._vmm)

    def __del__(self) -> None:
        base, self._base = getattr(self, "_base", 0), 0
        if base and Gate.shut:  # the driver would wait for the streams, and nobody would open their gates
            Gate.late.append(functools.partial(_free, base, self.device, self.kind, self._vmm))
        elif base:
            _free(base, self.device, self.kind, self._vmm)


def _free(base: int, device: int, kind: Kind, vmm: tuple[Any, int]) -> None:
    driver().use(device)
    if kind is Kind.VMM:
        address, size = vmm
        driver()("cuMemUnmap", address, ctypes.c_size_t(size))
        driver()("cuMemAddressFree", address, ctypes.c_size_t(size))
    elif kind is Kind.POOL:
        driver()("cuMemFreeAsync", Address(base), None)
        driver()("cuStreamSynchronize", None)
    elif kind is Kind.PINNED:
        driver()("cuMemFreeHost", Handle(base))
    else:
        driver()("cuMemFree", Address(base))


class Part:
    """Bytes of a `DeviceArray`."""

    def __init__(self, whole: DeviceArray, start: int, nbytes: int) -> None:
        self._whole = whole
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (whole.address + start, False),
            "strides": None,
            "version": 3,
        }

"""The CUDA driver as discovery asks it: through cuda-python where that is installed, else by ctypes.

Only questions that need no context are asked in this process: a context takes hundreds of megabytes of the
GPU. What needs one is tried by `_cuda_probe` in a child.
"""

from __future__ import annotations

import contextlib
import ctypes
import uuid
from dataclasses import dataclass
from typing import Any, Final, Protocol

__all__ = ["CudaError", "Device", "Driver", "NoDriver", "open_driver"]

LIBRARY: Final = "libcuda.so.1"

_PCI_BUS, _PCI_DEVICE, _PCI_DOMAIN = 33, 34, 50
_MAJOR, _MINOR = 75, 76
_VMM_DESCRIPTORS = 103
_PERFORMANCE_RANK, _ACCESS, _ATOMICS = 1, 2, 3
_NAME_BYTES = 100


class NoDriver(Exception):
    """The driver's library does not load."""


class CudaError(Exception):
    """A call of the driver failed."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call} gives {name} ({code})")
        self.call, self.code, self.name = call, code, name


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU that this process sees. `memory` is in bytes, `pci` its address on the bus."""

    index: int
    name: str
    uuid: str
    memory: int
    pci: str
    capability: tuple[int, int]
    shares_descriptors: bool


class Driver(Protocol):
    """What discovery asks. Every call but `version` comes after `start`, and raises `CudaError`."""

    source: str

    def version(self) -> int:
        """As CUDA has it: 12080 for 12.8."""

    def start(self) -> None:
        """Initialise the driver."""

    def count(self) -> int:
        """Devices."""

    def name(self, device: int) -> str:
        """Of a device."""

    def uuid(self, device: int) -> bytes:
        """Of a device; 16 bytes."""

    def memory(self, device: int) -> int:
        """Of a device, in bytes."""

    def attribute(self, which: int, device: int) -> int:
        """CUdevice_attribute of a device."""

    def peer_attribute(self, which: int, device: int, peer: int) -> int:
        """CUdevice_P2PAttribute of a pair."""

    def can_access(self, device: int, peer: int) -> bool:
        """Whether `device` can reach memory of `peer`."""


class ByCtypes:
    """The library itself."""

    def __init__(self, library: str) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise NoDriver(str(error)) from error
        self.source = library

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            code = int(getattr(self._library, name)(*arguments))
        except AttributeError:
            raise CudaError(name, 500, "CUDA_ERROR_NOT_FOUND") from None
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise CudaError(name.removesuffix("_v2"), code, (text.value or b"an unknown error").decode())

    def _number(self, kind: Any, name: str, *arguments: Any) -> int:
        value = kind()
        self._call(name, ctypes.byref(value), *arguments)
        return int(value.value)

    def version(self) -> int:
        return self._number(ctypes.c_int, "cuDriverGetVersion")

    def start(self) -> None:
        self._call("cuInit", ctypes.c_uint(0))

    def count(self) -> int:
        return self._number(ctypes.c_int, "cuDeviceGetCount")

    def name(self, device: int) -> str:
        text = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", text, _NAME_BYTES, device)
        return text.value.decode(errors="replace")

    def uuid(self, device: int) -> bytes:
        value = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", value, device)
        return bytes(value)

    def memory(self, device: int) -> int:
        return self._number(ctypes.c_size_t, "cuDeviceTotalMem_v2", device)

    def attribute(self, which: int, device: int) -> int:
        return self._number(ctypes.c_int, "cuDeviceGetAttribute", which, device)

    def peer_attribute(self, which: int, device: int, peer: int) -> int:
        return self._number(ctypes.c_int, "cuDeviceGetP2PAttribute", which, device, peer)

    def can_access(self, device: int, peer: int) -> bool:
        return self._number(ctypes.c_int, "cuDeviceCanAccessPeer", device, peer) != 0


class ByCudaPython:
    """cuda.bindings.driver, NVIDIA's own bindings."""

    def __init__(self) -> None:
        try:
            import cuda.bindings
            from cuda.bindings import driver
        except ImportError as error:
            raise NoDriver("cuda-python is not installed") from error
        self._cuda = driver
        self.source = f"cuda-python {cuda.bindings.__version__}"
        try:
            self.version()
        except (OSError, RuntimeError, CudaError) as error:  # it loads the library at the first call
            raise NoDriver(str(error)) from error

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._cuda, name)(*arguments)
        if int(code):
            raise CudaError(name, int(code), getattr(code, "name", "an unknown error"))
        return values[0] if values else None

    def version(self) -> int:
        return int(self._call("cuDriverGetVersion"))

    def start(self) -> None:
        self._call("cuInit", 0)

    def count(self) -> int:
        return int(self._call("cuDeviceGetCount"))

    def name(self, device: int) -> str:
        text: bytes = self._call("cuDeviceGetName", _NAME_BYTES, device)
        return text.partition(b"\0")[0].decode(errors="replace")

    def uuid(self, device: int) -> bytes:
        ask = "cuDeviceGetUuid" if hasattr(self._cuda, "cuDeviceGetUuid") else "cuDeviceGetUuid_v2"
        return bytes(self._call(ask, device).bytes)

    def memory(self, device: int) -> int:
        return int(self._call("cuDeviceTotalMem", device))

    def attribute(self, which: int, device: int) -> int:
        return int(self._call("cuDeviceGetAttribute", self._cuda.CUdevice_attribute(which), device))

    def peer_attribute(self, which: int, device: int, peer: int) -> int:
        kind = self._cuda.CUdevice_P2PAttribute(which)
        return int(self._call("cuDeviceGetP2PAttribute", kind, device, peer))

    def can_access(self, device: int, peer: int) -> bool:
        return bool(self._call("cuDeviceCanAccessPeer", device, peer))


def open_driver(library: str | None) -> Driver:
    """The driver, not yet started; `library` in libcuda's place is asked directly.

    Raises:
        NoDriver: it does not load.
    """
    if library:
        return ByCtypes(library)
    with contextlib.suppress(NoDriver):
        return ByCudaPython()
    return ByCtypes(LIBRARY)


def device(driver: Driver, index: int) -> Device:
    """Everything about one device.

    Raises:
        CudaError: the driver does not tell.
    """
    domain, bus, slot = (driver.attribute(which, index) for which in (_PCI_DOMAIN, _PCI_BUS, _PCI_DEVICE))
    return Device(
        index=index,
        name=driver.name(index),
        uuid=f"GPU-{uuid.UUID(bytes=driver.uuid(index))}",
        memory=driver.memory(index),
        pci=f"{domain:04x}:{bus:02x}:{slot:02x}",
        capability=(driver.attribute(_MAJOR, index), driver.attribute(_MINOR, index)),
        shares_descriptors=driver.attribute(_VMM_DESCRIPTORS, index) != 0,
    )


def connection(driver: Driver, first: int, second: int) -> str:
    """How two devices reach each other: "NVLink", "PCIe", or "" where they do not.

    Atomic operations over the connection are what tells NVLink from PCIe in this interface.
    """
    if not (driver.can_access(first, second) and driver.can_access(second, first)):
        return ""
    return "NVLink" if driver.peer_attribute(_ATOMICS, first, second) else "PCIe"

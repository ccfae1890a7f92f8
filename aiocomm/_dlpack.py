"""GPU memory of libraries that offer DLPack only: cuda.core's buffers among them.

The capsule is read and kept, never consumed: it holds the memory until the transfer has ended, and lets go of
it then. The layout is that of dlpack.h, version 0.8 (`DLManagedTensor`).
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, NamedTuple

from aiocomm.errors import UsageError, UsageTypeError

__all__ = ["CUDA", "Tensor", "device_kind", "read"]

CUDA: Final = 2
_KINDS: Final = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}
_BFLOAT: Final = 4
_LEGACY: Final = 1  # the legacy default stream, whose handle may be 0 elsewhere


class _Tensor(ctypes.Structure):
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
    )


class Tensor(NamedTuple):
    """What a capsule describes. `strides` are in bytes, None: contiguous; `typestr` is as in NumPy."""

    owner: Any
    address: int
    device: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    typestr: str
    itemsize: int


def device_kind(array: Any) -> int | None:
    """The DLPack type of the device on which an array lies; None: it has no DLPack."""
    probe = getattr(array, "__dlpack_device__", None)
    return int(probe()[0]) if probe is not None else None


def read(array: Any, stream: int) -> Tensor:
    """Describe an array of `device_kind` CUDA.

    Args:
        array: of a library that may have queued work on it, on whatever stream.
        stream: handle of the stream that its library makes wait for that work.

    Raises:
        UsageError: its library does not export it.
        UsageTypeError: what it exports is no capsule of DLPack, or has elements that are no whole bytes.
    """
    try:
        capsule = array.__dlpack__(stream=stream or _LEGACY)
    except (BufferError, RuntimeError, TypeError) as error:
        raise UsageError(f"{type(array).__name__} cannot be exported: {error}") from error
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    try:
        tensor = _Tensor.from_address(pointer(capsule, b"dltensor") or 0)
    except ValueError as error:
        raise UsageTypeError(f"the __dlpack__ of {type(array).__name__} gives no capsule: {error}") from error
    nbits = tensor.bits * tensor.lanes
    if nbits % 8:
        raise UsageTypeError(f"{type(array).__name__} has elements of {nbits} bits: send it as bytes")
    itemsize = nbits // 8
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(step * itemsize for step in tensor.strides[: tensor.ndim]) if tensor.strides else None
    typestr = "<V2" if tensor.code == _BFLOAT else f"<{_KINDS.get(tensor.code, 'V')}{itemsize}"
    address = tensor.data + tensor.byte_offset
    return Tensor((array, capsule), address, tensor.device_id, shape, strides, typestr, itemsize)

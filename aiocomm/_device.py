"""GPU arrays as the native side takes them: an address, a size, a device, a stream, a dtype and a shape.

Called for messages of GPU arrays that the native side does not read itself, as it does plain ones with
`__cuda_array_interface__`, and tensors of torch once it knows their dtype: torch's interface costs
microseconds, so torch is asked directly. No library is imported here; an array's own one is
loaded already.
"""

from __future__ import annotations

import math
import sys
from itertools import takewhile
from string import ascii_letters
from typing import Any, Final, TypeAlias

from aiocomm import _dlpack
from aiocomm._streams import NO_STREAM, current_of_torch, resolve
from aiocomm.errors import UsageError, UsageTypeError
from aiocomm_native import _core

__all__ = ["NO_STREAM", "Description", "DeviceArray", "describe", "is_read_only", "itemsize_of", "part_of"]

Description: TypeAlias = tuple[Any, int, int, int, int, str, tuple[int, ...]]
"""What keeps the memory, address, bytes, device (-1: wherever it is), stream handle, dtype, shape."""

_TORCH_FORMATS: Final = {
    "torch.float32": "f",
    "torch.float64": "d",
    "torch.float16": "e",
    "torch.int8": "b",
    "torch.uint8": "B",
    "torch.int16": "h",
    "torch.int32": "i",
    "torch.int64": "q",
    "torch.bool": "?",
    "torch.complex64": "Zf",
    "torch.complex128": "Zd",
    "torch.float8_e4m3fn": "f8e4m3fn",  # names of eight characters at most
    "torch.float8_e5m2": "f8e5m2",
}
_INTERFACE_FORMATS: Final = {
    "f2": "e",
    "f4": "f",
    "f8": "d",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
    "b1": "?",
    "c8": "Zf",
    "c16": "Zd",
}
_TYPESTRS: Final = {form: f"<{name}" for name, form in _INTERFACE_FORMATS.items()}
_formats: dict[Any, str] = {}  # by dtype of torch or CuPy: a look-up instead of making a string


class DeviceArray:
    """GPU memory that `recv_array(device=...)` has made, with the sender's shape and dtype.

    `torch.as_tensor(x, device="cuda")` and `cupy.asarray(x)` are arrays over the same memory, and keep it
    alive. Its memory goes back with the last of them, once the work on it is done. A dtype that the interface
    cannot name (bfloat16) is shown as bytes: `torch.as_tensor(x, device="cuda").view(torch.bfloat16)`.
    """

    def __init__(
        self, memory: Any, address: int, nbytes: int, device: int, form: str, shape: tuple[int, ...]
    ) -> None:
        self._memory = memory  # gives it back
        typestr = _TYPESTRS.get(form)
        # The peer's word may be of more elements than there are bytes, or of none along an endless side.
        if typestr is None or math.prod(shape) * int(typestr[2:]) != nbytes or max(shape, default=0) >> 63:
            typestr, shape = "|u1", (nbytes,)
        self.address = address
        self.nbytes = nbytes
        self.device = device
        self.shape = shape
        self.typestr = typestr

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "data": (self.address, False),
            "shape": self.shape,
            "strides": None,
            "typestr": self.typestr,
            "version": 3,
        }

    def __repr__(self) -> str:
        return f"<aiocomm.DeviceArray {self.typestr} {self.shape} on GPU {self.device}>"


def describe(array: Any, writable: bool, stream: Any = None) -> Description | None:
    """Describe a GPU array, or answer None where it is none.

    Args:
        array: a torch or CuPy array, or anything with `__cuda_array_interface__` or DLPack.
        writable: whether it will be written.
        stream: whose queued work is waited for; None: the array's library's current one.

    Raises:
        UsageError: it is not contiguous, or is read-only but must be written.
        UsageTypeError: `stream` is not one.
    """
    kind = type(array)
    library = kind.__module__.partition(".")[0]
    if library == "torch" or (library not in ("cupy", "numpy") and _is_tensor(array)):
        if not array.is_cuda:
            return None
        if not array.is_contiguous():
            raise _not_contiguous(array, array.shape, array.stride(), "x.contiguous()")
        device: int = array.device.index
        form = _formats.get(array.dtype)
        if form is None:
            form = _formats[array.dtype] = _format_of_torch(array.dtype)
            _core.note_torch_format(array.dtype, form)
        torch = sys.modules.get("torch") if stream is None else None
        handle = resolve(stream, array, device) if torch is None else current_of_torch(torch, device)
        return (
            array,
            array.data_ptr(),
            array.nbytes,
            device,
            handle,
            form,
            tuple(array.shape),
        )
    if library == "cupy":
        if not array.flags.c_contiguous:
            raise _not_contiguous(array, array.shape, array.strides, "cupy.ascontiguousarray(x)")
        device = array.device.id
        return (
            array,
            array.data.ptr,
            array.nbytes,
            device,
            resolve(stream, array, device),
            _format_of_numpy(array.dtype.str),
            array.shape,
        )
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is not None:
        return _from_interface(array, interface, writable, stream)
    return _from_dlpack(array, stream) if _dlpack.device_kind(array) == _dlpack.CUDA else None


def itemsize_of(described: Description) -> int:
    """Bytes of an element, also of an array that has none."""
    _, _, nbytes, _, _, form, shape = described
    if count := math.prod(shape):
        return nbytes // count
    typestr = _TYPESTRS.get(form)
    if typestr:
        return int(typestr[2:])
    bits = "".join(takewhile(str.isdigit, form.lstrip(ascii_letters)))  # bfloat16, f8e4m3fn
    return max(1, int(bits or 8) // 8)


def is_read_only(array: Any) -> bool:
    """Whether a GPU array says that it must not be written (JAX's do)."""
    if type(array).__module__.partition(".")[0] == "torch":
        return False  # its interface is slow, and never says so
    interface = getattr(array, "__cuda_array_interface__", None)
    return interface is not None and bool(interface["data"][1])


def part_of(described: Description, start: int, nbytes: int, stream: int | None = None) -> Description:
    """Bytes of described memory.

    Args:
        start: of the first, in bytes.
        nbytes: how many.
        stream: handle of a stream instead of the described one.
    """
    array, address, _, device, handle, _, _ = described
    return array, address + start, nbytes, device, handle if stream is None else stream, "B", (nbytes,)


def _from_dlpack(array: Any, stream: Any) -> Description:
    handle = resolve(stream, array, -1)
    found = _dlpack.read(array, handle)
    if found.strides is not None and not _is_contiguous(found.shape, found.strides, found.itemsize):
        raise _not_contiguous(array, found.shape, found.strides, "a contiguous copy")
    form, nbytes = _format_of_numpy(found.typestr), math.prod(found.shape) * found.itemsize
    return (found.owner, found.address, nbytes, found.device, handle, form, found.shape)


def _is_tensor(array: Any) -> bool:
    torch = sys.modules.get("torch")  # of a class derived from its tensor, nn.Parameter among them
    return torch is not None and isinstance(array, torch.Tensor)


def _from_interface(array: Any, interface: Any, writable: bool, stream: Any) -> Description:
    try:
        address, read_only = interface["data"]
        shape = tuple(int(dim) for dim in interface["shape"])
        typestr = str(interface["typestr"])
        itemsize = int(typestr[2:])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageTypeError(
            f"the __cuda_array_interface__ of {type(array).__name__} makes no sense: {error}"
        ) from error
    strides = interface.get("strides")
    if strides is not None and not _is_contiguous(shape, strides, itemsize):
        raise _not_contiguous(array, shape, strides, "a contiguous copy")
    if writable and read_only:
        raise UsageError(f"the array ({type(array).__name__}) is read-only: receive into a writable one")
    nbytes = math.prod(shape) * itemsize
    return (
        array,
        int(address or 0),
        nbytes,
        -1,
        resolve(stream, array, -1),
        _format_of_numpy(typestr),
        shape,
    )


def _is_contiguous(shape: tuple[int, ...], strides: Any, itemsize: int) -> bool:
    expected = itemsize
    for dim, stride in zip(reversed(shape), reversed(tuple(strides)), strict=True):
        if dim == 0:
            return True
        if dim != 1 and stride != expected:
            return False
        expected *= dim
    return True


def _not_contiguous(array: Any, shape: Any, strides: Any, instead: str) -> UsageError:
    return UsageError(
        f"the array ({type(array).__name__}, shape {tuple(shape)}, strides {tuple(strides)}) is not "
        f"contiguous in C order: pass {instead} to send it, or a contiguous array to receive into"
    )


def _format_of_torch(dtype: Any) -> str:
    name = str(dtype)
    return _TORCH_FORMATS.get(name) or name.partition(".")[2][:8]


def _format_of_numpy(typestr: str) -> str:
    return _INTERFACE_FORMATS.get(typestr[1:], "B")

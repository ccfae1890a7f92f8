"""Arrays as buffers: what can be sent and received, and memory that moves with a single copy."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from aiocomm._device import DeviceArray
from aiocomm.errors import UsageError, UsageTypeError
from aiocomm_native import _core

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["DeviceArray", "as_buffer", "empty"]

S = TypeVar("S", bound=np.generic)


@overload
def empty(shape: int | tuple[int, ...]) -> NDArray[np.float32]: ...


@overload
def empty(shape: int | tuple[int, ...], dtype: type[S] | np.dtype[S]) -> NDArray[S]: ...


@overload
def empty(shape: int | tuple[int, ...], dtype: DTypeLike = ...) -> NDArray[Any]: ...


def empty(shape: int | tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Make an uninitialised array in shared memory.

    Peers on this host read it with a single copy, and collectives there write it so, too, without the kernel.

    Args:
        shape: as for `numpy.empty`.
        dtype: as for `numpy.empty`.

    Raises:
        LinkError: the system refuses the memory.
    """
    dims = _dimensions(shape)
    if any(dim < 0 for dim in dims):
        raise UsageError(f"negative dimension in shape {dims}")
    kind = np.dtype(dtype)
    nbytes = max(1, math.prod(dims) * kind.itemsize)
    memory = _core.allocate_shared(min(nbytes, 1 << 63))  # that much is refused
    return np.ndarray(dims, kind, memoryview(memory))


def _dimensions(shape: Any) -> tuple[int, ...]:
    try:
        if isinstance(shape, Iterable):
            return tuple(int(operator.index(dim)) for dim in shape)
        return (int(operator.index(shape)),)
    except TypeError:
        raise UsageTypeError(f"shape={shape!r}: pass an integer, or several") from None


def as_buffer(array: Any, writable: bool) -> Any:
    """Make a host array of any library a buffer over the same memory.

    Takes, in C order, the buffer protocol, `__array_interface__`, and DLPack producers without `__array__`
    (torch, JAX).

    Raises:
        UsageError: it is not contiguous, is read-only but must be written, or lies on a device.
        UsageTypeError: it is not an array.
    """
    try:
        view = memoryview(array)
    except TypeError:
        view = _foreign(array).data
    except (BufferError, ValueError) as error:
        # NumPy has no buffer format for some dtypes (datetime64, bfloat16 of ml_dtypes): their bytes travel.
        if not isinstance(array, np.ndarray):
            raise UsageTypeError(f"{type(array).__name__} cannot be sent: {error}") from error
        view = _without_objects(array).data
    if "O" in view.format:
        view = _without_objects(array).data
    if not view.c_contiguous:
        raise UsageError(
            f"the array ({type(array).__name__}, shape {view.shape}, strides {view.strides}) is not "
            "contiguous in C order: pass numpy.ascontiguousarray(x) to send it, or a contiguous buffer to "
            "receive into"
        )
    if writable and view.readonly:
        raise UsageError(f"the buffer ({type(array).__name__}) is read-only: receive into a writable array")
    return view


def _without_objects(array: Any) -> NDArray[np.uint8]:
    """Let pass what has an O in a field's name only."""
    if isinstance(array, np.ndarray) and not array.dtype.hasobject:
        return _bytes_of(array)
    raise UsageTypeError(
        f"{type(array).__name__} holds Python objects, which are addresses in this process: send "
        "pickle.dumps(x)"
    )


def _bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    if not array.flags.c_contiguous:
        raise UsageError("the array is not contiguous in C order: pass numpy.ascontiguousarray(x)")
    flat = np.asarray(array).reshape(-1).view(np.uint8)
    return flat.reshape(*array.shape[:-1], array.shape[-1] * array.itemsize) if array.ndim else flat


def _foreign(array: Any) -> NDArray[Any]:
    if type(array) is tuple and len(array) == 7 and hasattr(array[0], "__cuda_array_interface__"):
        array = array[0]  # a description (aiocomm/_device.py): with `stream=`, where there is no GPU
    if hasattr(array, "__cuda_array_interface__") or _dlpack_device(array) not in (None, 1, 3):
        raise UsageError(
            f"{type(array).__name__} lies on a device that cannot be used here: the cuda link is not enabled "
            "(AIOCOMM_LINKS), finds no GPU (`aiocomm doctor`), or this operation takes host memory only; "
            "copy it to the host (`.cpu()`, `.get()`)"
        )
    if _dlpack_device(array) is not None:
        try:
            return np.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError) as error:
            foreign = _unexported(array)
            if foreign is None:
                raise UsageError(f"{type(array).__name__} cannot be exported: {error}") from error
            return foreign
    if hasattr(array, "__array_interface__"):
        return np.asarray(array)
    raise UsageTypeError(
        f"{type(array).__name__} is not an array: pass bytes, a NumPy array, or anything with the buffer "
        "protocol, __array_interface__ or DLPack"
    )


def _dlpack_device(array: Any) -> int | None:
    probe = getattr(array, "__dlpack_device__", None)
    return int(probe()[0]) if probe is not None else None


def _unexported(array: Any) -> NDArray[Any] | None:
    """A tensor of torch that it does not export: one that needs gradients, or has a dtype that NumPy lacks.

    Of such a dtype (bfloat16, float8) these are the bytes. None: it cannot be had.
    """
    if type(array).__module__.partition(".")[0] != "torch":
        return None
    import torch

    failures = BufferError, RuntimeError, TypeError
    plain = array.detach()
    with contextlib.suppress(*failures):
        return np.from_dlpack(plain)
    with contextlib.suppress(*failures):
        if plain.is_contiguous():
            return np.from_dlpack((plain if plain.dim() else plain.reshape(1)).view(torch.uint8))
        raise UsageError(
            f"the array (Tensor, shape {tuple(plain.shape)}, strides {plain.stride()}) is not contiguous in "
            "C order: pass x.contiguous()"
        )
    return None

"""Arguments of collectives as flat NumPy arrays."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm import _dlpack
from aiocomm.arrays import as_buffer
from aiocomm.errors import UsageError, UsageTypeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = [
    "MEAN",
    "OPERATORS",
    "array_of",
    "check_name",
    "check_operator",
    "dtype_name",
    "dtype_of",
    "flat",
    "operator",
]

MEAN: Final = "mean"
_LONGEST_NAME: Final = 60  # of the fields of a dtype, in full
OPERATORS: Final[dict[str, np.ufunc]] = {
    "sum": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    MEAN: np.add,  # and a division of the result
}


def flat(x: Any, name: str, writable: bool = False) -> Array:
    """A one-dimensional view of a contiguous host array of any library.

    Raises:
        UsageError: it is not contiguous, is read-only but written to, or lies on a device.
    """
    if not isinstance(x, np.ndarray):
        if x is None:
            raise UsageTypeError(f"{name} is None: pass an array")
        view = np.asarray(as_buffer(x, writable))
        dtype = _lost_dtype(x, view.dtype)
        return view.reshape(-1) if dtype is None else view.reshape(-1).view(dtype)
    _check_unmasked(x, name)
    if x.dtype.hasobject:
        raise UsageTypeError(f"{name} holds Python objects, which are addresses in this process")
    if not x.dtype.itemsize:
        raise UsageTypeError(f"{name} is of dtype {x.dtype}, whose elements have no bytes")
    if not x.flags.c_contiguous:
        raise UsageError(f"{name} is not contiguous in C order: pass numpy.ascontiguousarray({name})")
    if writable and not x.flags.writeable:
        raise UsageError(f"{name} is read-only")
    return np.asarray(x).reshape(-1)  # a matrix has two dimensions for ever


def _check_unmasked(x: Any, name: str) -> None:
    """Refuse an array of which the mask would not travel."""
    if isinstance(x, np.ma.MaskedArray):
        raise UsageTypeError(f"{name} is a masked array, and masks do not travel: pass {name}.filled()")


def array_of(x: Any, name: str) -> Array:
    """An array of the host, or nested sequences, as an array.

    Raises:
        UsageError: rows are of different lengths, it has a mask, or is no array of the host.
    """
    _check_unmasked(x, name)
    try:
        found = np.asarray(x)
        if not found.dtype.hasobject or found.ndim:
            return found
    except (TypeError, ValueError, RuntimeError) as error:
        if not hasattr(x, "__dlpack_device__"):
            if isinstance(error, RuntimeError):
                raise
            raise UsageError(f"{name} cannot be made an array: pass rows of one length ({error})") from error
    # NumPy makes anything an object; torch gives it no tensors with gradients, or of dtypes that it lacks.
    if hasattr(x, "__cuda_array_interface__") or _dlpack.device_kind(x) == _dlpack.CUDA:
        raise UsageError(f"{name} lies on a GPU, and the rest does not: pass {name}.cpu(), or {name}.get()")
    return flat(x, name).reshape(tuple(x.shape))


def _is_torchs(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "torch"


def _lost_dtype(x: Any, found: Any) -> Any:
    """The dtype of a torch tensor of which only the bytes were had; None: the buffer has it.

    Args:
        found: what the buffer says.
    """
    name = str(getattr(x, "dtype", "")).removeprefix("torch.")
    if not name.startswith(("bfloat16", "float8")):
        as_bytes = _is_torchs(x) and found == np.uint8 and name != "uint8"
        return np.dtype(f"V{x.element_size()}") if as_bytes else None  # which is moved, not computed with
    return dtype_of(name)


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of a name, also of those that NumPy knows by ml_dtypes only.

    Raises:
        UsageError: that package is not there.
    """
    if not name.startswith(("bfloat16", "float8")):
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise UsageError(f"dtype {name} needs the package ml_dtypes: pip install ml_dtypes") from None
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


@functools.cache
def dtype_name(dtype: Any) -> str:
    """The name that all ranks compare; another byte order is another dtype, and so are other fields."""
    if getattr(dtype, "names", None) is None:
        return str(dtype.name if getattr(dtype, "isnative", True) else dtype.str)
    fields = _fields(dtype)
    if len(fields) > _LONGEST_NAME:
        fields = hashlib.blake2b(fields.encode(errors="backslashreplace"), digest_size=8).hexdigest()
    return f"{dtype.name} of {fields}"


def _fields(dtype: np.dtype[Any]) -> str:
    """What a structured dtype is made of, and where that lies."""
    if dtype.subdtype is not None:
        item, shape = dtype.subdtype
        return f"{shape}{_fields(item)}"
    if dtype.names is None or dtype.fields is None:
        return dtype_name(dtype)
    parts = []
    for name in dtype.names:
        item, at, *_ = dtype.fields[name]
        parts.append(f"{at} {name!r} {_fields(item)}")
    return f"{{{', '.join(parts)}}} {dtype.itemsize}"


def check_name(op: Any) -> None:
    """Refuse what names no reduction.

    Raises:
        UsageError: unknown, or no name.
    """
    if not isinstance(op, str):
        raise UsageTypeError(f"op={op!r} is not a name: choose from {', '.join(OPERATORS)}")
    if op not in OPERATORS:
        raise UsageError(f"unknown reduction {op!r}: choose from {', '.join(OPERATORS)}")


def check_operator(op: str, dtype: str, whole: bool) -> None:
    """Refuse what no array of the dtype can be reduced by, wherever it lies.

    Args:
        whole: elements of the dtype are whole numbers.

    Raises:
        UsageError: unknown, or the result would be of another dtype.
    """
    check_name(op)
    if op == MEAN and whole:
        raise UsageError(f"mean of {dtype} is not of {dtype}: use sum, or a floating dtype")


@functools.cache
def operator(op: str, dtype: np.dtype[Any]) -> np.ufunc:
    """The NumPy function of a reduction.

    Raises:
        UsageError: unknown, or not defined for the dtype.
    """
    check_operator(op, str(dtype), dtype.kind in "iu")
    if dtype.kind == "b":
        if op not in ("min", "max"):
            raise UsageError(f"{op} of bool is not of bool: use min (of all) or max (of any)")
        return OPERATORS[op]
    extended = dtype.kind == "V" and dtype.names is None and dtype.name.startswith(("bfloat", "float"))
    if (dtype.kind not in "iufc" and not extended) or not dtype.isnative:
        raise UsageError(f"cannot reduce arrays of dtype {dtype}")
    return OPERATORS[op]

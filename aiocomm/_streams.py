"""Streams of any library, as the driver's handles.

No library is imported: a stream or an array of one that is not loaded cannot exist. The handles 0 and 1 are
the legacy default stream, 2 the per-thread one; all others are addresses.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from aiocomm.errors import UsageError, UsageTypeError

__all__ = ["LEGACY", "NO_STREAM", "PER_THREAD", "current_of_torch", "resolve"]

LEGACY: Final = 0
"""Handle of the legacy default stream, which waits for all blocking streams of its device."""

PER_THREAD: Final = 2
"""Handle of the default stream of whichever thread names it."""

NO_STREAM: Final = 2**64 - 1
"""Of memory for which no queued work is waited for."""


def resolve(stream: Any, array: Any, device: int) -> int:
    """The handle of a stream; of None, of the current one of the array's library.

    Args:
        stream: a stream of torch, CuPy, cuda-python or cuda.core, anything with `__cuda_stream__`, a handle
            as an integer, or None.
        array: the array that is moved.
        device: index of its device, or -1 where the library does not say.

    Raises:
        UsageError: it is an integer that is no handle.
        UsageTypeError: it is not a stream.
    """
    if stream is None:
        return _current(array, device)
    handle = _handle(stream)
    if not 0 <= handle < NO_STREAM:
        raise UsageError(
            f"stream={stream!r} is no stream handle: pass the stream, its handle, 0 for the legacy default "
            "stream or 2 for the per-thread one"
        )
    return handle


def _current(array: Any, device: int) -> int:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return current_of_torch(torch, device)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return int(cupy.cuda.get_current_stream(device).ptr)
    interface = getattr(array, "__cuda_array_interface__", None) or {}
    stream = interface.get("stream", LEGACY)
    return NO_STREAM if stream is None else int(stream)


def current_of_torch(torch: Any, device: int) -> int:
    """The handle of torch's current stream, without an object for it where that is possible."""
    quick = getattr(getattr(torch, "_C", None), "_cuda_getCurrentRawStream", None)
    return int(torch.cuda.current_stream(device).cuda_stream if quick is None else quick(device))


def _handle(stream: Any) -> int:
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return _by_protocol(
            stream, protocol() if callable(protocol) else protocol
        )  # was an attribute at first
    for name in ("cuda_stream", "ptr"):  # torch, CuPy
        found = getattr(stream, name, None)
        if isinstance(found, int):
            return found
    # The bindings of cuda-python wrap a handle, and are converted; a number of any kind is not a stream.
    if type(stream).__name__ in ("CUstream", "cudaStream_t"):
        return int(stream)
    hint = ": pass a stream of torch, CuPy or cuda-python, anything with __cuda_stream__, or a handle as int"
    raise UsageTypeError(f"stream={stream!r} ({type(stream).__name__}) is not a stream{hint}")


def _by_protocol(stream: Any, answer: Any) -> int:
    try:
        version, handle = answer
        return int(handle) if int(version) == 0 else _unknown(version)
    except (TypeError, ValueError) as error:
        raise UsageTypeError(
            f"the __cuda_stream__ of {type(stream).__name__} answers {answer!r}, and not (0, handle)"
        ) from error


def _unknown(version: Any) -> int:
    raise ValueError(f"version {version} of __cuda_stream__ is not known")

"""Streams of any library, as the driver's handles."""

from __future__ import annotations

import sys
from typing import Any

from aiocomm.errors import UsageTypeError

__all__ = ["resolve"]


def resolve(stream: Any, array: Any, device: int) -> int:
    """The handle of a stream; of None, of the current one of the array's library."""
    if stream is None:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(array, torch.Tensor):
            return int(torch.cuda.current_stream(device).cuda_stream)
        cupy = sys.modules.get("cupy")
        if cupy is not None and isinstance(array, cupy.ndarray):
            return int(cupy.cuda.get_current_stream().ptr)
        interface = getattr(array, "__cuda_array_interface__", {})
        return int(interface.get("stream") or 0)
    if isinstance(stream, int):
        return stream
    for name in ("cuda_stream", "ptr"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    raise UsageTypeError(f"{type(stream).__name__} is not a stream")

"""Reads small GPU arrays back into host memory, where nothing of a call is under way any more."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import anyio
import numpy as np

from aiocomm._device import NO_STREAM
from aiocomm.collectives.gpu import name_of
from aiocomm.errors import UsageTypeError
from aiocomm_native import _core

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aiocomm._device import Description
    from aiocomm.moe.memory import Pool

    Bytes = NDArray[np.uint8]

__all__ = ["host_array", "read_back"]

_PATIENCE_S: Final = 1.0  # for the work that an array's stream has
_LOOK_S: Final = 1e-3


async def read_back(pool: Pool, described: Description) -> Any:
    """What an array holds once the work of its stream is done. None: that, or the copy, takes too long."""
    _, address, nbytes, _, stream, _, _ = described
    context, own = pool.kernels.context, pool.kernels.stream
    until = time.monotonic() + _PATIENCE_S
    if stream != NO_STREAM and not await _idle(context, stream, until):
        return None
    memory = pool.take_pinned(nbytes)
    _core.copy_on(context, own, memory.address, address, nbytes)
    if not await _idle(context, own, until):
        return None  # and the memory is not used again
    found = host_array(described, memory.bytes).copy()
    pool.give_back_pinned(memory)
    return found


async def _idle(context: int, stream: int, until: float) -> bool:
    while not _core.stream_is_idle(context, stream):
        if time.monotonic() > until:
            return False
        await anyio.sleep(_LOOK_S)
    return True


def host_array(described: Description, memory: Bytes) -> Any:
    """What a GPU array holds, of which these bytes are a copy."""
    name = name_of(described[5])
    data = memory[: described[2]]
    if name == "bfloat16":  # which NumPy has not by itself
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(described[6])
    try:
        dtype = np.dtype(name)
    except TypeError:
        raise UsageTypeError(f"an array of {name} holds neither numbers of experts nor weights") from None
    return data.view(dtype).reshape(described[6])

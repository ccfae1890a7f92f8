"""Memory that no other process can read, as that of devices: `memfd_secret` of the kernel."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any, Final

import numpy as np

__all__ = ["MISSING", "secret_array"]

_MEMFD_SECRET: Final = 447
_libc: Final = ctypes.CDLL(None)


def _missing() -> str | None:
    descriptor = _libc.syscall(_MEMFD_SECRET, 0)
    if descriptor < 0:
        return "this kernel has no memfd_secret"
    os.close(descriptor)
    return None


MISSING: Final = _missing()
"""Why there is none."""


def secret_array(nbytes: int) -> np.ndarray[Any, Any]:
    """An array of bytes, all 0, in such memory."""
    descriptor = _libc.syscall(_MEMFD_SECRET, 0)
    try:
        os.ftruncate(descriptor, nbytes)
        return np.frombuffer(mmap.mmap(descriptor, nbytes), np.uint8)
    finally:
        os.close(descriptor)

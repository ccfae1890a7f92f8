"""Calls of the CUDA driver that Python makes for kernels."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from aiocomm.config import driver_library
from aiocomm.errors import LinkError

__all__ = ["driver"]


class _Driver:
    """The driver's entry points by ctypes: of the library that the link uses."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(driver_library() or "libcuda.so.1")

    def __call__(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            called = (text.value or b"?").decode()
            raise LinkError(f"a kernel on a GPU: {name.removesuffix('_v2')} gives {called}", code=code)


@functools.cache
def driver() -> _Driver:
    """The one of this process."""
    return _Driver()

"""Limit the threads of the BLAS that NumPy has loaded: two processes with all cores each would fight."""

from __future__ import annotations

import ctypes
from pathlib import Path

__all__ = ["limit_threads"]

_SETTERS = (
    "scipy_openblas_set_num_threads64_",  # NumPy's own wheels
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
    "MKL_Set_Num_Threads",
    "bli_thread_set_num_threads",
)


def limit_threads(count: int) -> bool:
    """Let every loaded BLAS use `count` threads; False if none is known here.

    Done in the running process, as the environment's variables count only before NumPy is imported.
    """
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    found = False
    for path in paths:
        if not any(word in Path(path).name.lower() for word in ("blas", "mkl_rt", "blis")):
            continue
        try:
            library = ctypes.CDLL(path)
        except OSError:  # replaced on disk since it was loaded
            continue
        for setter in _SETTERS:
            if hasattr(library, setter):
                getattr(library, setter)(ctypes.c_int(count))
                found = True
                break
    return found

"""Compiles libraries that stand in for a driver's."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

__all__ = ["shared_library"]

_FLAGS: Final = ("-std=c++20", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-pthread")


@functools.cache
def shared_library(folder: Path, name: str) -> Path:
    """Compile a folder's C++ files if they have changed. One copy per source text serves all processes."""
    sources = sorted(folder.glob("*.[ch]pp"))
    compiler = os.environ.get("CXX", "g++")
    digest = hashlib.sha256(" ".join((compiler, *_FLAGS)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aiocomm-tests"
    library = cache / digest.hexdigest()[:16] / name
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch, ThreadPoolExecutor(2) as workers:

        def compiled(source: Path) -> str:
            target = str(Path(scratch) / f"{source.stem}.o")
            subprocess.run([compiler, *_FLAGS, "-c", str(source), "-o", target], check=True)
            return target

        objects = list(workers.map(compiled, (path for path in sources if path.suffix == ".cpp")))
        built = Path(scratch) / name
        subprocess.run([compiler, *_FLAGS, "-shared", *objects, "-o", str(built), "-ldl"], check=True)
        library.parent.mkdir(exist_ok=True)
        built.replace(library)  # at once: another process may have been faster
    return library

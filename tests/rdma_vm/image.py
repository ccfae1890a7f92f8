"""A disk image with what Python loads, so that the guest does not fetch it file by file over the shared root.

Thousands of small files are what starting Python and its packages costs, and each costs an emulated machine
several messages. The image holds the standard library, the packages that the tests need and the checkout's
tests, each mounted over the folder that it came from.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NEEDED = (
    *("aiocomm", "pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist"),
    *("hypothesis", "trio", "uvloop", "anyio"),
)
"""Distributions, and what these depend on."""

_LEFT_OUT = (
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "ensurepip",
    "site-packages",
    "dist-packages",
    "turtledemo",
    "lib2to3",
)
_SPARE_NBYTES = 32 << 20
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def build(mke2fs: str, image: Path, staging: Path, checkout: Path) -> dict[str, Path]:
    """Make an ext4 image; needs no rights.

    Args:
        mke2fs: The program, of e2fsprogs.
        image: The file to make.
        staging: An empty folder for the tree; hard links where they can be.
        checkout: Whose tests are taken along.

    Returns:
        Folders of the image, each with the folder of this machine that it replaces.
    """
    library, site = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    trees: dict[str, tuple[Path, Iterable[Path]]] = {
        "library": (library, _below(library, _LEFT_OUT)),
        "site": (site, _packages(site)),
        "tests": (checkout / "tests", _below(checkout / "tests", ())),
    }
    for name, (source, files) in trees.items():
        for file in files:
            _place(file, staging / name / file.relative_to(source))
    (staging / "library/site-packages").mkdir(exist_ok=True)
    nbytes = sum(path.stat().st_blocks * 512 + 4096 for path in staging.rglob("*"))
    with image.open("wb") as file:
        file.truncate(nbytes + nbytes // 4 + _SPARE_NBYTES)
    command = [mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(staging), str(image)]
    subprocess.run(command, check=True, capture_output=True)
    return {name: source for name, (source, _) in trees.items()}


def closure(names: Iterable[str]) -> set[str]:
    """Installed distributions, with all that they depend on and that is installed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [match[0] for text in requires if "extra ==" not in text and (match := _NAME.match(text))]
    return found


def _packages(site: Path) -> Iterator[Path]:
    """Whole top-level folders: what was put into them since they were installed counts, too."""
    tops = {
        entry.parts[0]
        for name in closure(NEEDED)
        for entry in importlib.metadata.files(name) or []
        if entry.parts[0] != ".."
    }
    for path in (site / top for top in sorted(tops)):
        if path.is_dir():
            yield from _below(path, ())
        elif path.is_file():
            yield path


def _below(folder: Path, left_out: tuple[str, ...]) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith("config-")]
        yield from (Path(where) / name for name in files)


def _place(file: Path, at: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, at)
    except FileNotFoundError:
        return  # of somebody who compiles, under its first name
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(file, at)

"""Builds the little archive that a kernel starts from: busybox, a few modules, and a script."""

from __future__ import annotations

import gzip
import lzma
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_DIRECTORY, _FILE, _END = 0o040755, 0o100755, "TRAILER!!!"
_ALIGN = 4

WANTED = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
"""What it takes to mount another machine's folders; everything else is loaded from there."""


def build(modules: Path, busybox: Path, init: str) -> bytes:
    """Return an initramfs.

    Args:
        modules: Folder of the kernel's modules, `/lib/modules/VERSION`.
        busybox: A static one.
        init: Text of `/init`; it finds modules numbered in load order in `/modules`.

    Raises:
        LookupError: The kernel lacks one of `WANTED`.
    """
    files: dict[str, bytes] = {"bin/busybox": busybox.read_bytes(), "init": init.encode()}
    for number, path in enumerate(load_order(modules, WANTED)):
        files[f"modules/{number:02}-{path.name.partition('.')[0]}.ko"] = _unpacked(path)
    folders = ("bin", "modules", "proc", "sys", "dev", "lower", "over", "new")
    entries = [_entry(name, _DIRECTORY, b"") for name in folders]
    entries += [_entry(name, _FILE, data) for name, data in files.items()]
    return b"".join([*entries, _entry(_END, 0, b"")])


def load_order(modules: Path, wanted: tuple[str, ...]) -> list[Path]:
    """Return the files of modules, each after those that it depends on.

    Raises:
        LookupError: One of them is neither a module nor part of the kernel.
    """
    needs: dict[str, tuple[Path, list[str]]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[_name(path)] = (modules / path, [_name(other) for other in others.split()])
    builtin = {_name(line) for line in (modules / "modules.builtin").read_text().splitlines()}
    order: dict[str, Path] = {}

    def add(name: str) -> None:
        if name in order or name in builtin:
            return
        if name not in needs:
            raise LookupError(f"the kernel of {modules} has no module {name}")
        path, others = needs[name]
        for other in reversed(others):  # modules.dep names the deepest dependency last
            add(other)
        order[name] = path

    for name in wanted:
        add(name)
    return list(order.values())


def _name(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    unpack = {".xz": lzma.decompress, ".gz": gzip.decompress}.get(path.suffix)
    return unpack(data) if unpack else data


def _entry(name: str, mode: int, data: bytes) -> bytes:
    """One member in the "newc" format that the kernel reads: hexadecimal header, name, data, both padded."""
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(header + encoded) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGN)

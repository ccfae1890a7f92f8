"""What a container hides: the namespaces of this process, as far as links depend on them."""

from __future__ import annotations

import os
from typing import Final

from aiocomm.links._report import read_text

__all__ = ["in_container", "private_namespaces"]

# The first namespaces of a machine have these inode numbers (include/linux/proc_ns.h).
_FIRST: Final = {"pid": 0xEFFFFFFC, "ipc": 0xEFFFFFFF}
_MARKS: Final = ("/.dockerenv", "/run/.containerenv", "/var/run/secrets/kubernetes.io")


def in_container() -> bool:
    """Whether this process runs in a container, as far as it can tell."""
    if any(os.path.exists(mark) for mark in _MARKS):
        return True
    groups = read_text("/proc/1/cgroup") or ""
    return any(word in groups for word in ("docker", "kubepods", "containerd", "libpod", "lxc"))


def private_namespaces() -> list[str]:
    """Those of "pid" and "ipc" that are not the machine's own."""
    return [kind for kind, first in _FIRST.items() if _inode(kind) not in (None, first)]


def _inode(kind: str) -> int | None:
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return None

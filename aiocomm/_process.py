"""What the launchers share: children that do not outlive their parent, and what these say."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
from typing import Final

__all__ = ["JOINED", "die_with_parent", "fresh_address", "fresh_token"]

JOINED: Final = b"j"
"""What a worker of `spawn` writes first once it is in the world; why it failed follows."""

_PR_SET_PDEATHSIG: Final = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, also by SIGKILL.

    Args:
        parent: its process id; if it is no longer the parent, it has ended before this call.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def fresh_address() -> str:
    """Where processes of this host can meet; leaves nothing behind."""
    return f"unix://@aiocomm-{os.getuid()}-{os.getpid()}-{secrets.token_hex(8)}"


def fresh_token() -> str:
    """A secret for one world."""
    return secrets.token_hex(32)

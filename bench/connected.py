"""Makes the connected stream socket that the socket peers use."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .control import Control


def connect(role: int, control: Control, family: Literal["unix", "tcp"]) -> socket.socket:
    """Return this process's end of one connected stream socket, blocking, without Nagle's delay."""
    if role == 0:
        with socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET) as listener:
            listener.bind(f"\0aiocomm-bench-{os.getpid()}" if family == "unix" else ("127.0.0.1", 0))
            listener.listen(1)
            control.send(listener.getsockname())
            connected, _ = listener.accept()
    else:
        connected = socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET)
        connected.connect(control.recv())
    if family == "tcp":
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected

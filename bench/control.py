"""The side channel between two processes: addresses, descriptors and barriers, never measured data."""

from __future__ import annotations

import os
import socket
from multiprocessing.connection import Connection
from typing import Any


class Control:
    """One end of a socket pair; objects and file descriptors go both ways, in order."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._objects = Connection(os.dup(fd))  # each object closes its own descriptor

    def send(self, value: object) -> None:
        """Send a picklable object."""
        self._objects.send(value)

    def recv(self) -> Any:
        """Wait for the other's next object.

        Raises:
            EOFError: The other process has ended.
        """
        return self._objects.recv()

    def swap(self, value: object) -> Any:
        """Send an object and return the other's; also a barrier."""
        self.send(value)
        return self.recv()

    def send_fds(self, fds: list[int]) -> None:
        """Pass copies of descriptors."""
        socket.send_fds(self._socket, [b"d"], fds)

    def recv_fds(self, count: int) -> list[int]:
        """Return `count` descriptors that the other passed; they are the caller's to close."""
        _, fds, _, _ = socket.recv_fds(self._socket, 1, count)
        return fds

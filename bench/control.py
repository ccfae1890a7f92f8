"""The side channel between processes: addresses, descriptors and barriers, never measured data."""

from __future__ import annotations

import os
import socket
from multiprocessing.connection import Connection
from typing import Any


class Control:
    """One end of a socket pair, or role 0's ends of several; objects and descriptors go both ways, in order.

    Args:
        fds: the sockets: one, or at role 0 one to each of the others.
        size: how many processes there are.
    """

    def __init__(self, fds: list[int], size: int = 2) -> None:
        self.size = size
        self._socket = socket.socket(fileno=fds[0])
        # Each object closes its own descriptor.
        self._objects = [Connection(os.dup(fds[0])), *(Connection(fd) for fd in fds[1:])]

    def send(self, value: object) -> None:
        """Send a picklable object, at role 0 to all others."""
        for other in self._objects:
            other.send(value)

    def recv(self) -> Any:
        """Wait for the other's next object, at role 0 for one of each; the last one's is returned.

        Raises:
            EOFError: The other process has ended.
        """
        return [other.recv() for other in self._objects][-1]

    def swap(self, value: object) -> Any:
        """Send an object and return the other's; also a barrier."""
        if len(self._objects) == 1:
            self.send(value)
            return self.recv()
        came = self.recv()  # role 0 of several: it lets nobody go on before all have come
        self.send(value)
        return came

    def send_fds(self, fds: list[int]) -> None:
        """Pass copies of descriptors to the other, of two."""
        socket.send_fds(self._socket, [b"d"], fds)

    def recv_fds(self, count: int) -> list[int]:
        """Return `count` descriptors that the other, of two, passed; they are the caller's to close."""
        _, fds, _, _ = socket.recv_fds(self._socket, 1, count)
        return fds

"""Notices at once when a process on this host ends, by a descriptor of the process itself."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final

from aiocomm._control.host import host_id, open_pidfd, pid_namespace

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiocomm._control.messages import PeerCard

__all__ = ["ProcessWatch"]

_GRACE_S: Final = 0.005
"""Between a process's end and its report: its goodbye may be in a socket that this loop reads in the same
turn.
"""


class ProcessWatch:
    """Holds a pidfd for each watched peer. Lives on the control thread's loop.

    Args:
        on_dead: told of (rank, generation, reason), once per peer.
    """

    def __init__(self, on_dead: Callable[[int, int, str], None]) -> None:
        self._host_id = ""  # of this process, once it is asked for
        self._on_dead = on_dead
        self._descriptors: dict[tuple[int, int], int] = {}

    def add(self, card: PeerCard) -> None:
        """Watch a peer, if its process id means something here."""
        loop = asyncio.get_running_loop()
        try:
            self._host_id = self._host_id or host_id()
            here = card.host_id == self._host_id and card.pid_namespace == pid_namespace()
            if not here or card.pid == os.getpid():
                return
            descriptor = open_pidfd(card.pid, card.start_time)
        except OSError:
            # An old kernel, no descriptor left, or another user's process, which is hidden: the control and
            # pair connections still hang up.
            return
        if descriptor is None:
            loop.call_later(_GRACE_S, self._report, card)
            return
        try:
            loop.add_reader(descriptor, self._ended, card)
        except OSError:  # past the limit of what a user may wait for, say: the same
            os.close(descriptor)
        else:
            self._descriptors[card.rank, card.generation] = descriptor

    def watches(self, card: PeerCard) -> bool:
        """Whether the end of a peer will be told."""
        return (card.rank, card.generation) in self._descriptors

    def remove(self, rank: int, generation: int) -> None:
        """Watch it no longer; idempotent."""
        descriptor = self._descriptors.pop((rank, generation), None)
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)

    def close(self) -> None:
        """Watch nobody any more."""
        for rank, generation in list(self._descriptors):
            self.remove(rank, generation)

    def _ended(self, card: PeerCard) -> None:
        self.remove(card.rank, card.generation)
        asyncio.get_running_loop().call_later(_GRACE_S, self._report, card)

    def _report(self, card: PeerCard) -> None:
        self._on_dead(card.rank, card.generation, f"process {card.pid} on {card.host} died")

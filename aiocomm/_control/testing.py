"""An engine that only records, for tests of the control plane without native code."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiocomm.errors import LinkError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Attachment", "RecordingEngine"]


@dataclass
class Attachment:
    """One call of `attach`."""

    rank: int
    generation: int
    link: str
    fds: list[int]
    peer_card: bytes
    initiator: bool


@dataclass
class RecordingEngine:
    """Takes what the control plane gives, and can be waited on.

    Args:
        links: name to (kind, streams), cheapest first.
        broken: links whose attach fails.
    """

    links: dict[str, tuple[str, int]] = field(default_factory=lambda: {"shm": ("unix", 1), "tcp": ("tcp", 3)})
    broken: frozenset[str] = frozenset()
    label: bytes = b""
    identity: tuple[int, int] | None = None
    peers: dict[int, int] = field(default_factory=dict)
    attached: dict[int, Attachment] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    lost: dict[tuple[int, int], str] = field(default_factory=dict)
    left: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()

    def wait(self, condition: Callable[[RecordingEngine], object], timeout_s: float = 20.0) -> None:
        """Block until the condition holds.

        Raises:
            TimeoutError: it did not within `timeout_s`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), timeout_s):
                raise TimeoutError(f"not within {timeout_s} s: {self}")

    def close(self) -> None:
        """Close all descriptors that were handed over."""
        with self._changed:
            for attachment in self.attached.values():
                for descriptor in attachment.fds:
                    os.close(descriptor)
            self.attached.clear()

    def set_identity(self, rank: int, generation: int) -> None:
        """Record it."""
        self._note(lambda: setattr(self, "identity", (rank, generation)))

    def link_names(self) -> list[str]:
        """The links given."""
        return list(self.links)

    def link_streams(self, link: str) -> tuple[str, int]:
        """The needs given."""
        return self.links[link]

    def link_card(self, link: str) -> bytes:
        """Recognisable on the other side."""
        return self.label + link.encode()

    def add_peer(self, rank: int, generation: int) -> None:
        """Record it."""
        self._note(lambda: self.peers.__setitem__(rank, generation))

    def attach(
        self, rank: int, generation: int, link: str, fds: list[int], peer_card: bytes, initiator: bool
    ) -> None:
        """Record it, or fail as asked."""
        if link in self.broken:
            for descriptor in fds:
                os.close(descriptor)
            raise LinkError(f"{link} is broken here")
        if rank in self.attached:
            raise AssertionError(f"rank {rank} attached twice")
        attachment = Attachment(rank, generation, link, fds, peer_card, initiator)
        self._note(lambda: self.attached.__setitem__(rank, attachment))

    def fail_connect(self, rank: int, reason: str) -> None:
        """Record it."""
        self._note(lambda: self.failed.__setitem__(rank, reason))

    def lose_peer(self, rank: int, generation: int, reason: str) -> None:
        """Record it."""
        self._note(lambda: self.lost.__setitem__((rank, generation), reason))

    def leave_peer(self, rank: int, generation: int) -> None:
        """Record it."""
        self._note(lambda: self.left.append((rank, generation)))

    def _note(self, change: Callable[[], object]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

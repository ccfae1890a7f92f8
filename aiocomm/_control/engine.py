"""What the control plane asks of the native engine. All of it may be called on any thread."""

from __future__ import annotations

from typing import Final, Protocol

__all__ = ["NOT_CONNECTED", "Engine"]

NOT_CONNECTED: Final = "no connection with rank "
"""How the reason of `fail_connect` begins: its operations fail as those of a lost peer, which it is not."""


class Engine(Protocol):
    """The control plane's view of `aiocomm_native.Engine`."""

    def set_identity(self, rank: int, generation: int) -> None:
        """This process's own rank and generation."""

    def set_open(self, is_open: bool) -> None:
        """Whether somebody may still join: a receive from any source waits for them, too. At first nobody."""

    def link_names(self) -> list[str]:
        """Enabled links, cheapest first."""

    def link_streams(self, link: str) -> tuple[str, int]:
        """Kind ("unix", "tcp" or "") and number of connected sockets that a pair needs on a link."""

    def link_card(self, link: str) -> bytes:
        """What the peer's end of the link must know; opaque."""

    def add_peer(self, rank: int, generation: int) -> None:
        """A peer is known; operations with it queue until a link is attached."""

    def attach(
        self, rank: int, generation: int, link: str, fds: list[int], peer_card: bytes, initiator: bool
    ) -> None:
        """Take the descriptors (also on failure); nothing is carried yet. Raises LinkError."""

    def start_pair(self, rank: int, generation: int) -> None:
        """Both sides are attached: start the queued operations."""

    def detach(self, rank: int, generation: int) -> None:
        """The other side could not attach: drop this one's end without a word. Idempotent."""

    def pair_state(self, rank: int, generation: int) -> str:
        """Of a peer that was started: "up"; "rested", if it was closed as idle; or "failed"."""

    def fail_connect(self, rank: int, reason: str) -> None:
        """No link to the peer could be made: its queued operations fail."""

    def lose_peer(self, rank: int, generation: int, reason: str) -> None:
        """The peer is dead: every operation with it fails."""

    def leave_peer(self, rank: int, generation: int) -> None:
        """The peer said goodbye."""

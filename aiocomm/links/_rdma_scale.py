"""What a process of a large world holds and says, by arithmetic. Pure.

The figures of the link are those of `aiocomm_native/links/rdma/rail.hpp`, which a test compares. Queue
entries are the adapter's matter; `REQUEST_NBYTES` is what common ones take. `python -m
aiocomm.links._rdma_scale` prints the table of the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["CARD_NBYTES", "HEARTBEAT_S", "Cost", "cost", "table"]

SLOT_NBYTES: Final = 8448
"""Of a slot for one frame: prefix, header, metadata and 4 KiB of payload."""
CREDITS: Final = 32
"""Frames that a peer may have on their way."""
MAX_SLOTS: Final = 4096
"""Receive slots of a rail: from there on peers share them."""
FRAME_DEPTH: Final = 128
BULK_DEPTH: Final = 160
PIECES_NBYTES: Final = 8 * 16
"""Of the pieces of memory that one request of bulk may be about."""
IMMEDIATES: Final = 4096
"""Receives without memory that are posted per rail, for writes with immediate."""
INLINE_NBYTES: Final = 512

REQUEST_NBYTES: Final = 64
"""Of a send queue's entry, without what is inline; of a receive's, and of a completion."""
COMPLETIONS: Final = 1 << 15
"""Entries of each of a rail's three completion queues."""
QUEUE_PAIRS: Final = 3
"""Per peer and rail: frames for its loop, other frames, bulk; one more for each further service level."""
CARD_NBYTES: Final = 189
"""Of a process's card with two addresses and three links, as the rendezvous tells it."""
TAG_NBYTES: Final = 16
CARDS_PER_FRAME: Final = 64
HEADER_NBYTES: Final = 9
"""Of a control frame that tells cards: its header, and how many they are."""
HANDSHAKE_FRAMES: Final = 11
"""Between two processes that connect, both ways: offer and answer, the link tried, its stream, ready, two of
attachment; and on the link's socket a hello and a word of readiness from each."""
HEARTBEAT_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one process, with `connected` of the `world`'s others; memory is pinned."""

    world: int
    connected: int
    queue_pairs: int
    receive_nbytes: int
    """Slots that all peers share."""
    send_nbytes: int
    """Frames that are kept until the peer's device has them."""
    queue_nbytes: int
    """Entries of all queues, in the adapter's or the driver's memory."""
    told_nbytes: int
    """What the rendezvous tells this process at the start, in all."""
    rank_zero_nbytes: int
    """What rank 0 tells all of them."""
    handshake_frames: int
    signs_per_s: float
    """Of life that this process sends while nothing else moves."""

    @property
    def memory_nbytes(self) -> int:
        """All of it."""
        return self.receive_nbytes + self.send_nbytes + self.queue_nbytes

    @property
    def per_peer_nbytes(self) -> float:
        """Memory per connected peer."""
        return self.memory_nbytes / self.connected


def cost(world: int, connected: int | None = None, rails: int = 2) -> Cost:
    """What a process holds.

    Args:
        world: Processes.
        connected: Others that it has exchanged something with; None is all of them.
        rails: Adapters in use.

    Raises:
        ValueError: There are not so many.
    """
    others = world - 1
    peers = others if connected is None else connected
    if not 0 < peers <= others or rails < 1:
        raise ValueError(f"{peers} of {others} peers over {rails} rails")
    slots = min(peers * CREDITS, MAX_SLOTS)
    frame_queue = FRAME_DEPTH * (REQUEST_NBYTES + INLINE_NBYTES)
    per_peer_queues = 2 * frame_queue + BULK_DEPTH * (REQUEST_NBYTES + PIECES_NBYTES)
    shared_queues = (MAX_SLOTS + IMMEDIATES + 3 * COMPLETIONS) * REQUEST_NBYTES
    frames = -(-others // CARDS_PER_FRAME)
    told = others * CARD_NBYTES + frames * (HEADER_NBYTES + TAG_NBYTES)
    return Cost(
        world=world,
        connected=peers,
        queue_pairs=QUEUE_PAIRS * peers * rails,
        receive_nbytes=slots * SLOT_NBYTES * rails,
        send_nbytes=peers * CREDITS * SLOT_NBYTES,
        queue_nbytes=(peers * per_peer_queues + shared_queues) * rails,
        told_nbytes=told,
        rank_zero_nbytes=told * others,
        handshake_frames=HANDSHAKE_FRAMES * peers,
        signs_per_s=(peers + 1) / HEARTBEAT_S,
    )


def table(rails: int = 2) -> str:
    """The table of the documentation, in Markdown."""
    cases = [cost(world, connected, rails) for world in (8, 512, 10_000) for connected in (None, 64, 8)
             if connected is None or connected < world - 1]  # fmt: skip
    titles = (
        "processes",
        "connected with",
        "queue pairs",
        "receive slots",
        "frames to send",
        "queues",
        "memory per peer",
        "handshakes",
        "told at the start",
        "rank 0 tells",
        "signs of life",
    )
    lines = [f"| {' | '.join(titles)} |", "|" + "--:|" * len(titles)]
    for case in cases:
        cells = (
            f"{case.world:,}",
            "all" if case.connected == case.world - 1 else f"{case.connected:,}",
            f"{case.queue_pairs:,}",
            _nbytes(case.receive_nbytes),
            _nbytes(case.send_nbytes),
            _nbytes(case.queue_nbytes),
            _nbytes(case.per_peer_nbytes),
            f"{case.handshake_frames:,} frames",
            _nbytes(case.told_nbytes),
            _nbytes(case.rank_zero_nbytes),
            f"{case.signs_per_s:,.0f}/s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _nbytes(value: float) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value / 1024:.1f} KiB"


if __name__ == "__main__":
    print(table())

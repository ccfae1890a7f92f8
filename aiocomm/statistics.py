"""Counters, as frozen snapshots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from aiocomm.histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aiocomm_native._core import Engine

__all__ = ["LinkStatistics", "Statistics"]


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    """Counters of one link since the communicator was opened.

    `submitted`, `completed`, `failed` and `cancelled` count this process's operations, each on one link;
    accesses of peers to regions are counted where they were submitted. `submitted` less the other three is
    what is under way on the link. An operation counts as submitted once its link is known: a receive when its
    message comes (until then it is one of `posted_receives`), others when they are connected. One that ends
    before counts on the link that its peer has had or, where there was none or the receive is of any source,
    on the first that is enabled. `failed` includes the calls of `send_nowait` that were refused,
    `would_block`.

    `bytes_sent` and `bytes_received` count payload when it goes over this link, whoever moves it and whatever
    comes of its message: what one end has sent the other has received. Three things only one end knows of:
    what the RDMA device of a peer reads from a region, or writes into it; what kernels and copies of
    collectives write into other ranks' GPU memory; and what a receive or `get` had fetched before it was
    given up.

    `messages_by_path` and `bytes_by_path` show how messages moved: `eager` (copied through the ring or
    socket), `mapped` (one copy between shared segments), `cma` (one copy by cross-memory attach), `stream`
    (through the ring or the sockets, chunk by chunk), `read` and `write` (by the RDMA device of the receiver,
    of the sender), `device` (by a copy engine between two GPUs), `staged` (GPU memory by a detour). A message
    is counted at both ends, accesses to regions as well, once it has ended well there. A small `send` has
    done so when it is handed over, unless it is `synchronous`: `eager` messages that nobody receives, or that
    are truncated, count at their sender alone. An end in GPU memory counts at `cuda`, the other at its own
    link.

    `device` has counters of the link's own, for `rdma` of what was posted to devices and what came of it, in
    all and by device; see the how-to page on RDMA. For `cuda` it tells where the time of small copies between
    GPUs went: `gpu0.small_copies`, and of them all `handed_ns` (until the copy thread had them), `issued_ns`
    (by the driver), `seen_ns` (until they were seen to have ended), `told_ns` (until their transfers had).

    `scheduled_bytes_by_channel` counts what went chunk by chunk, for as long as a channel is open and a while
    longer: channels that were closed long ago (256 others since) are counted together, as "\\0closed", and
    so are accesses of peers on channels that are not open here.

    `violations` counts pairs that were closed because what the peer sent made no sense.

    `queued_s` and `moved_s` tell how long completed operations took: until their first byte moved, and from
    then until they ended.
    """

    link: str
    submitted: int
    completed: int
    failed: int
    cancelled: int
    would_block: int
    fallbacks: int
    violations: int
    frames_sent: int
    frames_received: int
    bytes_sent: int
    bytes_received: int
    messages_by_path: Mapping[str, int]
    bytes_by_path: Mapping[str, int]
    scheduled_bytes_by_channel: Mapping[str, int]
    peers: int
    queued: int
    in_flight_bytes: int
    window_bytes: int
    chunk_bytes: int
    rate_bytes_per_s: float
    device: Mapping[str, int]
    queued_s: Histogram
    moved_s: Histogram

    @classmethod
    def collect(cls, engine: Engine, link: str) -> Self:
        """Read the native counters."""
        gauges = engine.gauges(link)
        counters = engine.counters(link)
        return cls(
            link=link,
            queued_s=Histogram.of(counters.pop("queued_s")),
            moved_s=Histogram.of(counters.pop("moved_s")),
            **counters,
            scheduled_bytes_by_channel=dict(engine.served_by_channel(link)),
            peers=int(gauges["peers"]),
            queued=int(gauges["queued"]),
            in_flight_bytes=int(gauges["in_flight_bytes"]),
            window_bytes=int(gauges["window_bytes"]),
            chunk_bytes=int(gauges["chunk_bytes"]),
            rate_bytes_per_s=gauges["rate_bytes_per_s"],
        )


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counters of a communicator: matching, and every link.

    `collectives` counts calls of collective operations that this rank has completed, by operation and
    algorithm, e.g. `all_reduce/ring`. What groups listen for all the time is not in flight.
    """

    in_flight: int
    posted_receives: int
    unexpected_messages: int
    unexpected_bytes: int
    links: Mapping[str, LinkStatistics]
    collectives: Mapping[str, int]

    @classmethod
    def collect(
        cls, engine: Engine, links: Iterable[str], collectives: Mapping[str, int], standing: int
    ) -> Self:
        """Read the native counters.

        Args:
            standing: receives that the runtime has posted for its own use.
        """
        gauges = engine.gauges("self")
        return cls(
            in_flight=max(0, int(gauges["in_flight"]) - standing),
            posted_receives=max(0, int(gauges["posted_receives"]) - standing),
            unexpected_messages=int(gauges["unexpected_messages"]),
            unexpected_bytes=int(gauges["unexpected_bytes"]),
            links={name: LinkStatistics.collect(engine, name) for name in links},
            collectives=dict(collectives),
        )

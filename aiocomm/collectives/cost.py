"""Chooses a collective's algorithm by a simple model of what it costs.

Every rank must choose alike, so the choice depends only on what all ranks know alike: the operation, the
bytes, the size of the group and the class of its links. The constants are rough on purpose: they separate
regimes; they do not predict times. `algorithm=` overrides the choice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from aiocomm.collectives.algorithms import applicable

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LINKS", "LinkCost", "choose", "chunk_bytes", "estimate"]

_CALL_S: Final = 6e-6  # to submit and end one transfer from Python
_REDUCE_S: Final = 1 / 6e9  # per byte
_COPY_S: Final = 1 / 8e9  # per byte


@dataclass(frozen=True, slots=True)
class LinkCost:
    """What a link costs.

    Args:
        message_s: seconds from a message's submission to the resumption of who awaits it.
        byte_s: seconds per byte of one stream.
        streams: streams of one rank that run at that rate at once.
    """

    message_s: float
    byte_s: float
    streams: float


LINKS: Final = {
    "shm": LinkCost(30e-6, 1 / 8e9, 3.0),  # receivers copy, each in its own process
    "tcp": LinkCost(60e-6, 1 / 2.5e9, 1.0),  # all share the network adapter
}


def estimate(operation: str, algorithm: str, size: int, nbytes: int, link: LinkCost) -> float:
    """Seconds that one call may take.

    Args:
        nbytes: of the whole vector: all blocks together, for all_to_all those of one rank.
    """
    others, rounds = size - 1, (size - 1).bit_length()
    block = nbytes / max(1, size)
    wait, byte, many = link.message_s, link.byte_s, max(1.0, others / link.streams)
    out_of_root = others * _CALL_S + nbytes * byte * many
    match operation.removesuffix("v"), algorithm:
        case "broadcast", "direct":
            return wait + out_of_root
        case "broadcast", "binomial":
            return rounds * (wait + _CALL_S + nbytes * byte)
        case "broadcast", "pipelined":
            return _pipelined(rounds, nbytes, wait, 2 * byte)
        case "broadcast", "chain":
            chunks = max(1, -(-nbytes // chunk_bytes("broadcast", nbytes, 1)))
            passed_on = 1 + max(0, others - 1) / chunks
            return others * wait + (others + chunks) * 2 * _CALL_S + nbytes * byte * passed_on
        case "reduce", "direct":
            return wait + out_of_root + others * nbytes * _REDUCE_S
        case "reduce", "binomial":
            return rounds * (wait + _CALL_S + nbytes * (byte + _REDUCE_S))
        case "reduce", "pipelined":
            return _pipelined(rounds, nbytes, wait, 2 * (byte + _REDUCE_S))
        case (("gather" | "scatter"), "direct"):
            return wait + others * _CALL_S + block * byte * many
        case (("gather" | "scatter"), "binomial"):
            return rounds * (wait + _CALL_S) + nbytes * (byte + 2 * _COPY_S)
        case (("all_gather" | "all_to_all"), "direct"):
            return wait + 2 * others * _CALL_S + others * block * byte
        case "all_gather", "ring":
            return others * (wait + 2 * _CALL_S + block * byte)
        case "all_gather", "recursive_doubling":
            return rounds * (wait + 2 * _CALL_S) + others * block * byte
        case "all_gather", "bruck":
            return rounds * (wait + 2 * _CALL_S) + others * block * byte + nbytes * _COPY_S
        case "all_to_all", "bruck":
            return rounds * (wait + 2 * _CALL_S + nbytes / 2 * (byte + 2 * _COPY_S))
        case "reduce_scatter", "direct":
            return wait + 2 * others * _CALL_S + others * block * (byte + _REDUCE_S)
        case "reduce_scatter", "ring":
            return others * (wait + 2 * _CALL_S + block * (byte + _REDUCE_S))
        case "all_reduce", "one_shot":
            return wait + others * (2 * _CALL_S + nbytes * (byte + _REDUCE_S))
        case "all_reduce", "recursive_doubling":
            extra = 2 * wait if size & (size - 1) else 0.0
            return extra + rounds * (wait + 2 * _CALL_S + nbytes * (byte + _REDUCE_S))
        case "all_reduce", "direct":
            return 2 * wait + 4 * others * _CALL_S + others * block * (2 * byte + _REDUCE_S)
        case "all_reduce", "ring":
            return 2 * others * (wait + 2 * _CALL_S) + others * block * (2 * byte + _REDUCE_S)
    raise KeyError((operation, algorithm))


def _pipelined(rounds: int, nbytes: int, wait: float, byte: float) -> float:
    chunks = max(1, -(-nbytes // chunk_bytes("broadcast", nbytes, 1)))
    return rounds * wait + (rounds + chunks) * 3 * _CALL_S + nbytes * byte * (1 + rounds / chunks)


def _between_hosts(operation: str, hosts: Sequence[int], nbytes: int, link: LinkCost) -> float:
    """Seconds of a hierarchical call: bytes cross the network once per host, the rest is within hosts."""
    size, local = len(hosts), max(Counter(hosts).values())
    count = len(set(hosts))
    here, most = LINKS["shm"], max(1.0, (local - 1) / LINKS["shm"].streams)
    within = here.message_s + 2 * local * _CALL_S
    match operation.removesuffix("v"):
        case "broadcast":
            rounds = (count - 1).bit_length()
            return (
                _pipelined(rounds, nbytes, link.message_s, 2 * link.byte_s)
                + within
                + nbytes * here.byte_s * most
            )
        case "reduce":
            rounds = (count - 1).bit_length()
            far = _pipelined(rounds, nbytes, link.message_s, 2 * (link.byte_s + _REDUCE_S))
            return far + within + (local - 1) * nbytes * (here.byte_s + _REDUCE_S)
        case "all_gather":
            crossing = nbytes * (size - local) / size
            return (
                link.message_s + size * _CALL_S + crossing * link.byte_s + 2 * within + nbytes * here.byte_s
            )
        case "reduce_scatter":
            crossing = nbytes * (count - 1) / size * local
            return (
                link.message_s
                + 2 * size * _CALL_S
                + crossing * link.byte_s
                + 2 * within
                + nbytes * here.byte_s
            )
        case _:
            crossing = 2 * nbytes * (count - 1) / count
            return (
                2 * (link.message_s + within)
                + crossing * link.byte_s
                + 2 * nbytes * (here.byte_s + _REDUCE_S)
            )


def choose(
    operation: str,
    size: int,
    nbytes: int,
    link: str,
    hosts: Sequence[int] = (),
    among: Sequence[str] = (),
) -> str:
    """The cheapest applicable algorithm.

    Args:
        link: a key of `LINKS`.
        hosts: a number for the host of each rank, where there are several. Their ranks share its adapter.
        among: those to choose from; empty: all.
    """
    cost = LINKS[link]
    shared = replace(cost, byte_s=cost.byte_s * max(Counter(hosts).values(), default=1))

    def seconds(name: str) -> float:
        if name == "hierarchical":
            return _between_hosts(operation, hosts, nbytes, cost)
        return estimate(operation, name, size, nbytes, shared)

    # A chain is what GPUs choose; among processes that share a host's memory it has not been measured.
    names = [name for name in applicable(operation, size, hosts) if name != "chain"]
    return min((name for name in names if not among or name in among), key=seconds)


def chunk_bytes(operation: str, block: int, item: int) -> int:
    """Bytes of the parts into which a block is cut: few enough to be cheap, small enough to stay in cache."""
    # Reductions wait for every part of a chunk: below 1 MiB the waits cost more than the overlap gives.
    low, high = (1 << 20, 2 << 20) if "reduce" in operation else (256 << 10, 2 << 20)
    wanted = min(max(block // 8, low), high, max(block, 1))
    return max(item, wanted // item * item)

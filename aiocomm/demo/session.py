"""What the demo's two processes agree on: ranks, channels, and orders from one to the other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import aiocomm

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "DEADLINE_S",
    "DECODE",
    "ORDER",
    "PREFILL",
    "Channels",
    "open_channels",
    "order",
    "pack",
    "receive",
]

PREFILL, DECODE = 0, 1
ORDER = 1
DEADLINE_S = 120.0
"""No wait of the demo is longer: whatever goes wrong, it ends with an error."""


class Channels(NamedTuple):
    """Bulk beneath, urgent above."""

    kv: aiocomm.Channel
    tokens: aiocomm.Channel


def open_channels(comm: aiocomm.Communicator) -> Channels:
    """The demo's two channels: the same names and classes on both sides."""
    return Channels(comm.channel("kv", weight=3.0), comm.channel("tokens", priority=aiocomm.Priority.URGENT))


async def order(comm: aiocomm.Communicator, **what: Any) -> None:
    """Tell the decode worker what to do next."""
    await open_channels(comm).tokens.send(pack(what), dst=DECODE, tag=ORDER, deadline=DEADLINE_S)


def pack(what: dict[str, Any]) -> NDArray[np.uint8]:
    """A message of plain values."""
    return np.frombuffer(json.dumps(what).encode(), np.uint8)


async def receive(channel: aiocomm.Channel, src: int, tag: int) -> dict[str, Any]:
    """Receive what `pack` packed."""
    message = await channel.recv_array(src=src, tag=tag, deadline=DEADLINE_S)
    what: dict[str, Any] = json.loads(message.tobytes())
    return what

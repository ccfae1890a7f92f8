"""The interface that every peer is brought under, blocking or awaitable, two-sided or not."""

from __future__ import annotations

import asyncio
import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from ..control import Control
    from ..model import Metrics
    from ..pair import Launcher
    from ..plan import Plan

Array = npt.NDArray[np.uint8]
Loop = Literal["blocking", "asyncio", "uvloop", "aiocomm"]


class Transport:
    """Messages to and from the one other process; the size of the next one is known to both.

    Blocking transports write their methods as coroutines that never suspend.
    """

    async def allocate(self, nbytes: int) -> tuple[Array, Array]:
        """Return what is sent and what is received into, both touched, so that no page fault is measured."""
        return np.ones(nbytes, np.uint8), np.full(nbytes, 2, np.uint8)

    async def send(self, data: Array) -> None:
        """Send all of `data`; it may be written again afterwards."""
        raise NotImplementedError

    async def recv(self, out: Array) -> None:
        """Fill `out` with the next message."""
        raise NotImplementedError

    async def send_many(self, messages: Sequence[Array]) -> None:
        """Send many, with all of them outstanding where the transport can."""
        for message in messages:
            await self.send(message)

    async def recv_many(self, outs: Sequence[Array]) -> None:
        """Receive many, with all of them outstanding where the transport can."""
        for out in outs:
            await self.recv(out)

    async def pause(self, seconds: float) -> None:
        """Do nothing for a while, as this kind of program would."""
        await asyncio.sleep(seconds)

    async def finish(self, control: Control | None) -> None:
        """Wait until the other has finished, too, with the loop still making progress."""
        if control is not None:
            await asyncio.to_thread(control.swap, "measured")


@dataclass(frozen=True)
class Peer:
    """One way of moving bytes between two processes of one host.

    Args:
        open: Connects; called in each process with its role (0 or 1) and the control channel.
        kind: "ours", another's library, written by hand for comparison, or raw: bytes without a message.
        wire: What carries the bytes; peers over tcp are compared among themselves.
        loop: What runs the coroutines.
        modules: Python modules it needs.
        install: What a person types where they are missing.
        sequence: Measures in place of `work.sequence`, for what isn't a two-sided transport.
        note: What a reader of the table should know.
    """

    name: str
    open: Callable[[int, Control], Awaitable[Transport]]
    kind: Literal["ours", "peer", "handmade", "raw"]
    wire: Literal["memory", "unix", "tcp"]
    loop: Loop = "asyncio"
    modules: tuple[str, ...] = ()
    install: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    launcher: Launcher = "pair"
    sequence: Callable[[Transport, int, Plan, Control], Awaitable[Metrics]] | None = None
    note: str = ""

    def missing(self) -> str:
        """Return what to install, or nothing where all is there."""
        wanted = (*self.modules, *(("uvloop",) if self.loop == "uvloop" else ()))
        absent = [name for name in wanted if importlib.util.find_spec(name) is None]
        return f"not installed: {self.install or 'pip install ' + ' '.join(absent)}" if absent else ""

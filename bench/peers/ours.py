"""aiocomm, in each mode that a user can choose."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Array, Loop, Peer, Transport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..control import Control

TOKEN = "aiocomm-bench"


async def connect(role: int, control: Control, *links: str) -> Any:
    """Return an open communicator of all ranks over these links alone."""
    import aiocomm

    name = f"unix://@aiocomm-bench-{os.getpid()}"
    address = control.swap(name) if role else (control.swap(name), name)[1]
    return await aiocomm.connect(address, rank=role, size=control.size, token=TOKEN, links=links, warmup=True)


class Ours(Transport):
    def __init__(self, comm: Any, empty: bool = False) -> None:
        self._comm = comm
        self._other = 1 - comm.rank
        self._empty = empty

    async def allocate(self, nbytes: int) -> tuple[Array, Array]:
        if not self._empty:
            return await super().allocate(nbytes)
        import aiocomm

        data, into = aiocomm.empty(nbytes, np.uint8), aiocomm.empty(nbytes, np.uint8)
        data[:], into[:] = 1, 2
        return data, into

    async def send(self, data: Array) -> None:
        await self._comm.send(data, dst=self._other)

    async def recv(self, out: Array) -> None:
        await self._comm.recv(out, src=self._other)

    async def send_many(self, messages: Sequence[Array]) -> None:
        for transfer in [self._comm.send(m, dst=self._other) for m in messages]:
            await transfer

    async def recv_many(self, outs: Sequence[Array]) -> None:
        for transfer in [self._comm.recv(o, src=self._other) for o in outs]:
            await transfer

    async def finish(self, control: Control | None) -> None:
        await super().finish(control)
        await self._comm.aclose()


async def _open(link: str, empty: bool, role: int, control: Control) -> Transport:
    return Ours(await connect(role, control, link), empty)


def _peer(
    name: str,
    link: str = "shm",
    loop: Loop = "asyncio",
    empty: bool = False,
    note: str = "",
    **environment: str,
) -> Peer:
    return Peer(
        name, partial(_open, link, empty), "ours", "tcp" if link == "tcp" else "memory", loop,
        ("aiocomm",), "pip install .", environment, note=note,
    )  # fmt: skip


def _new_links() -> list[str]:
    """Links without modes of their own here or in suites of their own. Nothing is imported to find them."""
    package = importlib.util.find_spec("aiocomm")
    folders = package.submodule_search_locations if package else None
    found = {info.name for info in pkgutil.iter_modules([f"{folder}/links" for folder in folders or ()])}
    return sorted(name for name in found - {"cuda", "rdma", "shm", "tcp"} if not name.startswith("_"))


PEERS = [
    _peer("aiocomm-shm"),
    _peer("aiocomm-shm-spin", loop="aiocomm", note="aiocomm.run(spin=50e-6)"),
    _peer("aiocomm-shm-uvloop", loop="uvloop"),
    _peer("aiocomm-shm-empty", empty=True, note="arrays of aiocomm.empty()"),
    _peer(
        "aiocomm-shm-empty-spin",
        loop="aiocomm",
        empty=True,
        note="arrays of aiocomm.empty(), aiocomm.run(spin=50e-6)",
    ),
    _peer("aiocomm-shm-bounce", note="cross-memory attach off", AIOCOMM_CMA="off"),
    _peer("aiocomm-tcp", link="tcp"),
    *(_peer(f"aiocomm-{link}", link=link) for link in _new_links()),
]

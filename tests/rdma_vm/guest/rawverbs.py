"""A verbs endpoint by hand, with pyverbs: the other side of what the native link posts.

It knows nothing of aiocomm: it makes a reliable-connected queue pair, says who it is in a few values, posts
what it is told to, and reports each completion as it came from the adapter. What it sees went over the wire.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, Final

from pyverbs import enums
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

PORT: Final = 1
ROCE_V2_IPV4: Final = 1  # index of that GID on soft-RoCE
PATIENCE_S: Final = 20
_DEPTH: Final = 64

ALL_ACCESS: Final = (
    enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE | enums.IBV_ACCESS_REMOTE_READ
)
_OPCODES: Final = {
    enums.IBV_WC_SEND: "send",
    enums.IBV_WC_RDMA_WRITE: "write",
    enums.IBV_WC_RDMA_READ: "read",
    enums.IBV_WC_RECV: "received",
    enums.IBV_WC_RECV_RDMA_WITH_IMM: "written with immediate",
}
_STATUSES: Final = {
    enums.IBV_WC_SUCCESS: "success",
    enums.IBV_WC_LOC_PROT_ERR: "local protection error",
    enums.IBV_WC_WR_FLUSH_ERR: "flushed",
    enums.IBV_WC_REM_INV_REQ_ERR: "remote invalid request",
    enums.IBV_WC_REM_ACCESS_ERR: "remote access error",
    enums.IBV_WC_REM_OP_ERR: "remote operation error",
    enums.IBV_WC_RETRY_EXC_ERR: "retries exceeded",
    enums.IBV_WC_RNR_RETRY_EXC_ERR: "receiver not ready",
}


@dataclass(frozen=True)
class Completion:
    """One entry of a completion queue, in words."""

    id: int
    status: str
    opcode: str
    nbytes: int
    immediate: int | None


class RawEndpoint:
    """One queue pair with one buffer that the other side may write and read.

    Args:
        device: Name.
        nbytes: Size of the buffer.
        access: Of the buffer.
        retries: Of packets; 7 would never end.
    """

    def __init__(
        self, device: str, nbytes: int = 1 << 16, access: int = ALL_ACCESS, retries: int = 6
    ) -> None:
        self.context = Context(name=device)
        self.domain = PD(self.context)
        self.queue = CQ(self.context, _DEPTH * 2)
        self.region = MR(self.domain, nbytes, access)
        self.nbytes, self._retries = nbytes, retries
        self.timeout = 17  # 4.096 µs · 2^17 = 0.5 s for each try: an emulated machine may stand still
        capacity = QPCap(max_send_wr=_DEPTH, max_recv_wr=_DEPTH, max_send_sge=1, max_recv_sge=1)
        wanted = QPInitAttr(
            qp_type=enums.IBV_QPT_RC, scq=self.queue, rcq=self.queue, cap=capacity, sq_sig_all=1
        )
        self.pair = QP(self.domain, wanted)
        self._next_id = 0
        self._gid = self.context.query_gid(PORT, ROCE_V2_IPV4)

    def card(self) -> dict[str, Any]:
        """Who this is, for the other side."""
        return {
            "qpn": self.pair.qp_num,
            "gid": str(self._gid),
            "address": self.region.buf,
            "rkey": self.region.rkey,
            "nbytes": self.nbytes,
        }

    def connect(self, other: dict[str, Any]) -> None:
        """Bring the queue pair up towards the owner of a card."""
        attributes = QPAttr(port_num=PORT)
        attributes.qp_access_flags = ALL_ACCESS
        self.pair.to_init(attributes)
        attributes = QPAttr(port_num=PORT)
        attributes.path_mtu = enums.IBV_MTU_1024
        attributes.dest_qp_num, attributes.rq_psn = other["qpn"], 0
        attributes.max_dest_rd_atomic, attributes.min_rnr_timer = 16, 12
        route = GlobalRoute(dgid=GID(other["gid"]), sgid_index=ROCE_V2_IPV4, hop_limit=64)
        attributes.ah_attr = AHAttr(is_global=1, port_num=PORT, gr=route)
        self.pair.to_rtr(attributes)
        attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = self.timeout, self._retries, 3
        attributes.sq_psn, attributes.max_rd_atomic = 0, 4
        self.pair.to_rts(attributes)

    def receive(self, nbytes: int = 4096, offset: int = 0) -> int:
        """Post a receive into the buffer; returns its id."""
        self._next_id += 1
        part = SGE(self.region.buf + offset, nbytes, self.region.lkey)
        self.pair.post_recv(RecvWR(wr_id=self._next_id, sg=[part], num_sge=1))
        return self._next_id

    def post(
        self,
        opcode: str,
        nbytes: int,
        *,
        offset: int = 0,
        to: tuple[int, int] = (0, 0),
        immediate: int | None = None,
    ) -> int:
        """Post a send, write or read of the buffer's bytes from `offset`; returns its id.

        Args:
            opcode: "send", "write" or "read".
            nbytes: How many.
            offset: Where in the buffer here.
            to: Remote address and rkey.
            immediate: Goes along with a send or a write.
        """
        self._next_id += 1
        kinds = {
            ("send", False): enums.IBV_WR_SEND,
            ("send", True): enums.IBV_WR_SEND_WITH_IMM,
            ("write", False): enums.IBV_WR_RDMA_WRITE,
            ("write", True): enums.IBV_WR_RDMA_WRITE_WITH_IMM,
            ("read", False): enums.IBV_WR_RDMA_READ,
        }
        part = SGE(self.region.buf + offset, nbytes, self.region.lkey)
        request = SendWR(
            wr_id=self._next_id,
            opcode=kinds[opcode, immediate is not None],
            num_sge=1,
            sg=[part],
            imm_data=0 if immediate is None else socket.htonl(immediate),
            # Solicited: a receiver that sleeps until something asks for its attention is woken.
            send_flags=enums.IBV_SEND_SIGNALED | enums.IBV_SEND_SOLICITED,
        )
        if opcode != "send":
            address, rkey = to
            request.set_wr_rdma(rkey, address)
        self.pair.post_send(request)
        return self._next_id

    def completion(self, patience_s: float = PATIENCE_S) -> Completion:
        """The next completion, polled for: pyverbs has no way to wait for one with a limit.

        Raises:
            TimeoutError: None came.
        """
        until = time.monotonic() + patience_s
        while (found := self.poll()) is None:
            if time.monotonic() > until:
                raise TimeoutError(f"no completion within {patience_s} s")
            os.sched_yield()
        return found

    def poll(self) -> Completion | None:
        """The next completion if it has come."""
        entries = self.queue.poll(1)[1]
        if not entries:
            return None
        entry = entries[0]
        carries = entry.wc_flags & enums.IBV_WC_WITH_IMM
        return Completion(
            id=entry.wr_id,
            status=_STATUSES.get(entry.status, f"status {entry.status}"),
            opcode=_OPCODES.get(entry.opcode, f"opcode {entry.opcode}"),
            nbytes=entry.byte_len,
            immediate=socket.ntohl(entry.imm_data) if carries else None,
        )

    def has_none(self) -> bool:
        """Whether no completion has come."""
        return not self.queue.poll(1)[1]

    def write_buffer(self, data: bytes, offset: int = 0) -> None:
        """Fill the buffer."""
        self.region.write(data, len(data), offset)

    def read_buffer(self, nbytes: int, offset: int = 0) -> bytes:
        """What the buffer holds."""
        held = self.region.read(nbytes, offset)
        return held if isinstance(held, bytes) else held.encode()

    def release(self) -> None:
        """Deregister the buffer: its keys are worth nothing from here on."""
        self.region.close()

    def close(self) -> None:
        """Release everything, in the order that verbs demand."""
        for held in (self.pair, self.queue, self.region, self.domain, self.context):
            held.close()

    def __enter__(self) -> RawEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def swap(connection: socket.socket, value: dict[str, Any]) -> dict[str, Any]:
    """Exchange JSON values with the other side: four bytes of length, then the text."""
    text = json.dumps(value).encode()
    connection.sendall(struct.pack("!I", len(text)) + text)
    (length,) = struct.unpack("!I", _exactly(connection, 4))
    answer: dict[str, Any] = json.loads(_exactly(connection, length))
    return answer


def _exactly(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        piece = connection.recv(nbytes - len(data))
        if not piece:
            raise ConnectionError("the other side left")
        data += piece
    return data

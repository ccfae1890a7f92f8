"""The headers of a call: what is sent to whom, and where what came lies.

In groups of at most `DIRECT_MEMBERS` every rank sends every other one message, which small data may share; in
larger ones headers go by dissemination.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from aiocomm.collectives import headers
from aiocomm.collectives.dissemination import exchange
from aiocomm.collectives.flight import Flight
from aiocomm.collectives.plan import EAGER_BYTES
from aiocomm.collectives.scope import TAG_BITS
from aiocomm.collectives.steps import Problem, Recv, Send

if TYPE_CHECKING:
    import numpy.typing as npt

    from aiocomm.collectives.plan import Plan
    from aiocomm.collectives.requests import Request
    from aiocomm.collectives.scope import Scope

__all__ = ["HEADERS", "Exchange", "slot_bytes"]

HEADERS: Final = 1 << (TAG_BITS - 1)  # tags of a call from here on carry headers


def slot_bytes(size: int) -> int:
    """Of what comes from one rank of a group: its header, with what may travel with it."""
    return headers.HEADER_BYTES + 16 * size + EAGER_BYTES


class Exchange(Flight):
    """The part of a `Call` that swaps headers. `_missing` is empty once all have come."""

    def __init__(self, scope: Scope, request: Request, deadline: float | None) -> None:
        super().__init__(scope, request.operation, deadline)
        self._request = request
        self._plan: Plan | None = request.plan
        self._brief = request.plan is None or request.plan.eager is not None
        self._slots: npt.NDArray[np.uint8] | None = None
        self._large = self._group.size > headers.DIRECT_MEMBERS

    def _send_headers(self) -> None:
        group, request = self._group, self._request
        size, rank = group.size, group.rank
        head = request.header
        eager = self._plan.eager if self._plan is not None else None
        if size == 1:
            return
        if self._large:
            self._disseminate(head)
            return
        self._width = width = slot_bytes(size)
        self._slots = slots = self._scope.scratch(size * width)
        for peer in range(size):
            if peer != rank:
                self._post(Recv, (True, peer), peer, slots[peer * width : (peer + 1) * width], HEADERS)
        for away in range(1, size):
            peer = (rank + away) % size
            message = head + request.vector
            if eager is not None and (span := eager.sends.get(peer)) is not None:
                message += request.views[span.buffer][span.start : span.stop].tobytes()
            self._post(Send, (True, size + peer), peer, message, HEADERS)

    def _disseminate(self, head: bytes) -> None:
        """Headers as a schedule of their own: its steps run as `(True, index)`."""
        size = self._group.size
        self._width = width = headers.HEADER_BYTES + 16 * size
        self._slots = slots = self._scope.scratch(size * width)
        slots[: len(head) + len(self._request.vector)] = np.frombuffer(head + self._request.vector, np.uint8)
        problem = Problem(self._group.rank, size, receives=(width,) * size)
        self._rounds = [s for s in exchange(problem).steps if isinstance(s, Send | Recv)]
        self._next_round()

    def _next_round(self) -> None:
        """Post a round's send and receive: the round before it has ended."""
        assert self._slots is not None
        self._round_left = 2
        index = len(self._rounds)
        pair, self._rounds = self._rounds[:2], self._rounds[2:]
        for step in pair:
            span = step.source if isinstance(step, Send) else step.target
            data = self._slots[span.start : span.stop]
            tag = HEADERS + index
            self._post(type(step), (True, index + (step is pair[0])), step.peer, data, tag)

    def _slot(self, peer: int) -> npt.NDArray[np.uint8]:
        """Where a peer's header lies; dissemination numbers slots backwards from this rank."""
        assert self._slots is not None
        place = (self._group.rank - peer) % self._group.size if self._large else peer
        return self._slots[place * self._width : (place + 1) * self._width]

    def _header_ended(self, index: int) -> None:
        if not self._large:
            self._missing.discard(index)  # sends count from `size` on
            return
        self._round_left -= 1
        if not self._round_left:
            if self._rounds:
                self._next_round()
            else:
                self._missing.clear()

"""Processes that speak a link's protocol by hand, and stand still at one step of it until they are killed.

`python -m fault.victims N` makes victims, each a fork of itself, as its end of the socket N asks: so a victim
costs milliseconds, and its descriptors are its own alone, so that the kernel closes them when it is killed. A
victim says on a pipe that it has come to its step.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fault.rawpeer import HEADER, Frame, Kind, RawEnd, default_channel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

LARGE: Final = 3 << 20
PORTION: Final = 1000
_LANE_OF_DATA: Final = 2


class TcpEnd:
    """One end of a pair over tcp: an express lane, one of the engine's, and those of `data` frames."""

    def __init__(self, lanes: list[socket.socket]) -> None:
        self.lanes = lanes
        self._read = [b""] * len(lanes)

    def send(self, frame: Frame, *, whole: bool = True) -> None:
        """Post a frame, or its first half."""
        frame.meta_bytes, frame.payload_bytes = len(frame.meta), len(frame.payload)
        record = frame.pack()
        lane = self.lanes[_LANE_OF_DATA if frame.kind == Kind.DATA else 0]
        lane.sendall(record if whole else record[: len(record) // 2])

    async def receive(self, *kinds: int) -> Frame:
        """The next frame of these kinds."""
        while True:
            for number, data in enumerate(self._read):
                if (frame := _parse(data)) is not None:
                    self._read[number] = data[len(frame.pack()) :]
                    if frame.kind in kinds:
                        return frame
                    break
            else:
                for lane in select.select(self.lanes, [], [])[0]:
                    data = lane.recv(1 << 20)
                    assert data, "the other end has closed the pair"
                    self._read[self.lanes.index(lane)] += data


def _parse(data: bytes) -> Frame | None:
    if len(data) < HEADER.size:
        return None
    frame = Frame(*HEADER.unpack_from(data))
    end = HEADER.size + frame.meta_bytes
    if len(data) < end + frame.payload_bytes:
        return None
    frame.meta, frame.payload = data[HEADER.size : end], data[end : end + frame.payload_bytes]
    return frame


# ---------------------------------------------------------------- the steps

End = Any  # RawEnd or TcpEnd
RTS: Final = Frame(Kind.RTS, channel=default_channel(), nbytes=LARGE, sop=9, meta=bytes(24))


async def _sends(end: End, step: str) -> None:
    """The other side receives."""
    if step == "half a record":
        end.send(RTS, whole=False)
    elif step != "before match":
        end.send(RTS)
        cts = await end.receive(Kind.CTS)
        if step == "mid-chunk":
            end.send(Frame(Kind.DATA, rop=cts.rop, sop=9, nbytes=LARGE, payload=b"\1" * PORTION))


async def _takes(end: End, step: str, announcement: Kind) -> None:
    """The other side sends, or puts."""
    asked = await end.receive(announcement)
    assert asked.nbytes == LARGE
    if step == "before match":
        return
    end.send(Frame(Kind.CTS, sop=asked.sop, rop=5))
    got = 0
    while got < {"after match": 0, "mid-chunk": 1, "before acknowledgement": LARGE}[step]:
        data = await end.receive(Kind.DATA)
        assert data.rop == 5
        got += len(data.payload)


async def _serves(end: End, step: str) -> None:
    """The other side gets."""
    asked = await end.receive(Kind.GET)
    if step != "before match":
        end.send(Frame(Kind.GET_READY, rop=asked.rop, sop=3, nbytes=LARGE))
    if step == "mid-chunk":
        end.send(Frame(Kind.DATA, rop=asked.rop, sop=3, nbytes=LARGE, payload=b"\1" * PORTION))


async def _keeps(end: End, kind: Kind) -> None:
    """The other side sends something small, and wants to know that it was taken."""
    await end.receive(kind)


async def _accesses(end: End, operation: str, number: int) -> None:
    """It puts, or gets, and the memory is the other side's."""
    if operation == "accesses by put":
        end.send(Frame(Kind.PUT_RTS, rop=number, sop=4, nbytes=LARGE))
        cts = await end.receive(Kind.CTS)
        end.send(Frame(Kind.DATA, rop=cts.rop, sop=4, nbytes=LARGE, payload=b"\1" * PORTION))
    else:
        end.send(Frame(Kind.GET, sop=number, rop=4, nbytes=LARGE))
        await end.receive(Kind.GET_READY)


_IN: Final = ("before match", "half a record", "after match", "mid-chunk")
_OUT: Final = ("before match", "after match", "mid-chunk", "before acknowledgement")
STEPS: Final[dict[tuple[str, str], Callable[[End], Awaitable[None]]]] = {
    **{("recv", step): lambda end, step=step: _sends(end, step) for step in _IN},  # type: ignore[misc]
    **{("send", step): lambda end, step=step: _takes(end, step, Kind.RTS) for step in _OUT},  # type: ignore[misc]
    **{("put", step): lambda end, step=step: _takes(end, step, Kind.PUT_RTS) for step in _OUT},  # type: ignore[misc]
    **{
        ("get", step): lambda end, step=step: _serves(end, step)  # type: ignore[misc]
        for step in ("before match", "after match", "mid-chunk")
    },
    ("small put", "before acknowledgement"): lambda end: _keeps(end, Kind.PUT),
    ("synchronous send", "before acknowledgement"): lambda end: _keeps(end, Kind.EAGER),
}


async def _live(link: str, socks: list[socket.socket], operation: str, step: str) -> None:
    end: End = RawEnd(socks[0]) if link == "shm" else TcpEnd(socks)
    if isinstance(end, RawEnd) and step != "before the greeting":
        await end.meet()
    if (operation, step) in STEPS:
        await STEPS[operation, step](end)
    elif operation.startswith("accesses"):
        await _accesses(end, operation, int(step))


# ---------------------------------------------------------------- making them


class Maker:
    """The process that makes victims, as seen from the test."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fault.victims", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            )

    def victim(self, link: str, socks: list[socket.socket], operation: str, step: str) -> tuple[int, int]:
        """Start one with these sockets, which it takes over; returns its pid, and a pipe of reports."""
        report, told = os.pipe()
        order = f"{link},{operation},{step}".encode()
        socket.send_fds(self._socket, [order], [told, *(sock.fileno() for sock in socks)])
        os.close(told)
        for sock in socks:
            sock.close()
        pid = int.from_bytes(self._socket.recv(4), "big")
        assert pid, "the process that makes victims has ended"
        return pid, report

    def close(self) -> None:
        """End it; victims are killed by their tests."""
        self._socket.close()
        self._process.wait()


def main(number: int) -> None:
    """Make victims until the other end is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # killed ones leave no zombies
    orders = socket.socket(fileno=number)
    while True:
        order, fds, _, _ = socket.recv_fds(orders, 4096, 32)
        if not order:
            return
        pid = os.fork()
        if pid == 0:
            orders.close()
            link, operation, step = order.decode().split(",")
            socks = [socket.socket(fileno=fd) for fd in fds[1:]]
            for sock in socks:
                sock.setblocking(True)
            asyncio.run(_live(link, socks, operation, step))
            os.write(fds[0], b"x")
            signal.pause()
        for fd in fds:
            os.close(fd)
        orders.send(pid.to_bytes(4, "big"))


if __name__ == "__main__":
    main(int(sys.argv[1]))

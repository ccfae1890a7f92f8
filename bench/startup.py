"""Suite `control`: how long a world of many processes takes to come together, and what that costs rank 0.

Rank 0 is real: `aiocomm.connect`, with its rendezvous, in a process of its own. The other ranks are simulated
in a second process, each with its own connection, handshake and card, as if eight ran on each host; they read
all that they are told but keep nothing of it. Everything is TCP, authenticated by token.

Metrics:
    ready_s: From the call of `connect` at rank 0, with all others knocking, until it returns.
    all_ready_s: Until the last of them has been told that the world is complete.
    cpu_s: Processor seconds of rank 0 until then, all threads.
    memory_mib: Growth of its resident memory.
    told_kib: Bytes that a member is told on its control connection.
    descriptors: File descriptors that rank 0 has open for it.
    idle_cores: Processor seconds per second of rank 0 with all connected and nothing to do.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Final

from aiocomm._control import messages, wire
from aiocomm._control.auth import HELLO_SIZE, TAG_SIZE, VERDICT_SIZE, Caller, Purpose

from . import pair
from .model import Column, Rule, Subject, Suite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics, Options

_SIZES: Final = (8, 128, 1024)
_HOST_RANKS: Final = 8
_IDLE_S: Final = 3.0
_HEADER: Final = struct.Struct("!2sBBI")
_TOKEN: Final = "benchmark"
_PAUSE_S: Final = 0.02


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Be rank 0, or all the others."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    part = _rank_zero if role == 0 else _others
    return asyncio.run(part(control, arguments["size"]))


async def _rank_zero(control: Control, size: int) -> Metrics:
    import aiocomm

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    gc.collect()
    memory, cpu, descriptors = _resident_mib(), time.process_time(), len(os.listdir("/proc/self/fd"))
    control.swap(port)
    start = time.monotonic()
    comm = await aiocomm.connect(
        f"tcp://127.0.0.1:{port}", rank=0, size=size, token=_TOKEN, deadline=600.0, links=("tcp",)
    )
    ready_s = time.monotonic() - start
    done = await asyncio.to_thread(control.recv)
    found = {
        "ready_s": ready_s,
        "all_ready_s": done["at"] - start,
        "cpu_s": time.process_time() - cpu,
        "memory_mib": _resident_mib() - memory,
        "told_kib": done["told"] / 1024,
        "descriptors": len(os.listdir("/proc/self/fd")) - descriptors,
    }
    cpu = time.process_time()
    await asyncio.sleep(_IDLE_S)
    found["idle_cores"] = (time.process_time() - cpu) / _IDLE_S
    if len(comm.peers) != size - 1:
        raise RuntimeError(f"rank 0 knows {len(comm.peers)} of {size - 1} peers")
    control.send("over")
    await asyncio.to_thread(control.recv)
    await comm.aclose()
    return found


async def _others(control: Control, size: int) -> Metrics:
    port = control.swap(0)
    members = [asyncio.create_task(_member(port, rank, size)) for rank in range(1, size)]
    joined = await asyncio.gather(*members)
    control.send({"at": time.monotonic(), "told": max(told for _, told in joined)})
    await asyncio.to_thread(control.recv)
    for connection, _ in joined:
        connection.close()
    control.send("left")
    return {}


async def _member(port: int, rank: int, size: int) -> tuple[socket.socket, int]:
    """Join; returns the connection and the bytes that came, once the world is complete."""
    while True:
        connection = socket.socket()
        connection.setblocking(False)
        try:
            return connection, await _join(connection, port, rank, size)
        except OSError:  # not listening yet, or too many at the door: as a real member does, try again
            connection.close()
            await asyncio.sleep(_PAUSE_S)


async def _join(connection: socket.socket, port: int, rank: int, size: int) -> int:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", port))
    side = Caller(_TOKEN.encode(), Purpose.CONTROL)
    await loop.sock_sendall(connection, side.hello())
    await loop.sock_sendall(connection, side.answer(await _exactly(connection, HELLO_SIZE)))
    side.finish(await _exactly(connection, VERDICT_SIZE))
    frame = wire.encode(messages.Join(rank, size, (), card(rank)))
    await loop.sock_sendall(connection, frame + side.seals()[0].tag(frame))
    told, waiting = 0, b""
    while True:
        data = await loop.sock_recv(connection, 1 << 18)
        if not data:
            raise ConnectionError("rank 0 closed the connection")
        told += len(data)
        waiting += data
        at = 0
        while len(waiting) - at >= _HEADER.size:
            _, _, code, length = _HEADER.unpack_from(waiting, at)
            end = at + _HEADER.size + length + TAG_SIZE
            if end > len(waiting):
                break
            if code == messages.Refused.CODE:
                raise RuntimeError(f"rank {rank} was refused")
            if code == messages.Ready.CODE:
                return told
            at = end
        waiting = waiting[at:]


async def _exactly(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        piece = await asyncio.get_running_loop().sock_recv(connection, nbytes - len(data))
        if not piece:
            raise ConnectionError("rank 0 closed the connection")
        data += piece
    return data


def card(rank: int) -> messages.PeerCard:
    """What a simulated process says of itself: eight on each host, two addresses, three links."""
    number = rank // _HOST_RANKS
    return messages.PeerCard(
        rank=0,
        generation=0,
        name=None,
        host=f"node-{number:04}.cluster.example",
        host_id=f"{number:032x}",
        pid=10_000 + rank,
        pid_namespace=4_026_531_836,
        start_time=1_000_000 + rank,
        devices=(),
        links=("shm", "rdma", "tcp"),
        addresses=(
            f"unix://@aiocomm-1000-{rank}-0123456789abcdef",
            f"tcp://10.0.{number % 256}.1:{20_000 + rank}",
        ),
    )


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def subjects(options: Options) -> list[Subject]:
    """A subject per size of world."""
    sizes = _SIZES[:-1] if options.quick else _SIZES
    return [Subject(f"aiocomm-{size}", "ours", "tcp", note=f"{size} ranks") for size in sizes]


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    size = int(name.rpartition("-")[2])
    return pair.run(f"{__name__}:child", {"size": size}, options.timeout_s)[0]


_COLUMNS = (
    Column("ready_s", "rank 0\nready, s", 2),
    Column("all_ready_s", "all\nready, s", 2),
    Column("cpu_s", "rank 0\nCPU s", 2),
    Column("memory_mib", "rank 0\nMiB", 1),
    Column("told_kib", "told a member,\nKiB", 0),
    Column("descriptors", "rank 0\nfiles", 0, "neither"),
    Column("idle_cores", "idle cores", 4),
)

SUITE = Suite(
    "control",
    "start-up of a world: rank 0 real, the others simulated on the same machine",
    subjects,
    measure,
    lambda options: _COLUMNS,
    (
        Rule("rank 0 of 1,024, CPU s", "aiocomm-1024", "cpu_s", "<=", 5.0),
        Rule("memory of rank 0 of 1,024, MiB", "aiocomm-1024", "memory_mib", "<=", 64.0),
    ),
)

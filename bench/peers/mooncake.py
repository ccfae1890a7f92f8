"""Mooncake's transfer engine over its TCP transport: synchronous one-sided writes.

The receiver takes no part and learns nothing, so a "half round trip" here is one write, timed until the
sender knows that it has arrived, and there is no idle receiver to measure.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from typing import TYPE_CHECKING

from .. import figures
from ..sizes import show
from .base import Array, Peer, Transport
from .blocking import BlockingTransport

if TYPE_CHECKING:
    from ..control import Control
    from ..model import Metrics
    from ..plan import Plan


class _Mooncake(BlockingTransport):
    arrays: tuple[Array, Array]  # held until the end: the other writes after this side's part is over

    def __init__(self) -> None:
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("mooncake: initialize() failed")


async def _open(role: int, control: Control) -> Transport:
    return _Mooncake()


async def _sequence(transport: Transport, role: int, plan: Plan, control: Control) -> Metrics:
    assert isinstance(transport, _Mooncake)
    engine = transport.engine
    data, into = transport.arrays = await transport.allocate(plan.largest)
    for array in (data, into):
        engine.register_memory(array.ctypes.data, array.nbytes)
    other, remote = control.swap((f"127.0.0.1:{engine.get_rpc_port()}", into.ctypes.data))
    found: Metrics = {}
    if role == 1:
        for nbytes, count in plan.bulk:
            control.swap("begin")
            cpu = time.process_time()
            control.swap("end")
            found[f"cpu_s_per_gb/{show(nbytes)}"] = (time.process_time() - cpu) / (nbytes * count / 1e9)
        return found

    def write(nbytes: int) -> None:
        if engine.transfer_sync_write(other, data.ctypes.data, remote, nbytes) != 0:
            raise RuntimeError("mooncake: write failed")

    for nbytes, count in plan.pingpong:
        write(nbytes)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            write(nbytes)
            times.append(time.perf_counter() - start)
        found[f"half_us/{show(nbytes)}"] = statistics.median(times) * 1e6
        found[f"p99_us/{show(nbytes)}"] = figures.percentile(times, 0.99) * 1e6
    for nbytes, count in plan.bulk:
        write(nbytes)
        control.swap("begin")
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            write(nbytes)
        gbytes = nbytes * count / 1e9
        found[f"gbytes_s/{show(nbytes)}"] = gbytes / (time.perf_counter() - start)
        found[f"cpu_s_per_gb/{show(nbytes)}"] = (time.process_time() - cpu) / gbytes
        control.swap("end")
    if plan.windows:
        offsets = [8 * i for i in range(plan.window)]
        sources = [data.ctypes.data + o for o in offsets]
        targets = [remote + o for o in offsets]
        start = time.perf_counter()
        for _ in range(plan.windows):
            if engine.batch_transfer_sync_write(other, sources, targets, [8] * plan.window) != 0:
                raise RuntimeError("mooncake: batch failed")
        found["messages_s"] = plan.windows * plan.window / (time.perf_counter() - start)
    return found


class _MooncakePeer(Peer):
    def missing(self) -> str:
        absent = super().missing()
        if absent:
            return absent
        try:
            ctypes.CDLL("libibverbs.so.1")
        except OSError:
            return "not installed: apt-get install libibverbs1 (the wheel links it, even for TCP)"
        return ""


PEERS = [
    _MooncakePeer(
        "mooncake-tcp", _open, "peer", "tcp", "blocking", ("mooncake",),
        "pip install mooncake-transfer-engine-non-cuda && apt-get install libibverbs1",
        environment={"MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "3"},
        sequence=_sequence, note="one-sided: its half round trip is one write",
    ),
]  # fmt: skip

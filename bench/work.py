"""The measuring sequence: the same steps for every peer, run by both processes.

Metrics:
    half_us/SIZE: Half of a round trip, median, in microseconds.
    p99_us/SIZE: The same, which 99 % do not exceed.
    gbytes_s/SIZE: 1e9 bytes per second, one message outstanding, until the receiver has all.
    cpu_s_per_gb/SIZE: User and system seconds of both processes per 1e9 bytes.
    messages_s: Messages of 8 bytes per second, `window` outstanding, all awaited.
    messages_s_serial: The same, each awaited before the next.
    idle_cores: Processor seconds per second that the receiver burns while it awaits what does not come.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING, Any, TypeVar

from . import figures, pair, peers
from .peers.base import Array, Loop, Transport
from .plan import Plan, plan_for
from .sizes import show

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from .control import Control
    from .model import Metrics, Options

T = TypeVar("T")
WARM_ROUND_TRIPS = 20
SPIN_S = 50e-6
_SUMMED = "cpu_s_per_gb/"  # metrics that are the sum over both processes


async def sequence(transport: Transport, role: int, plan: Plan) -> Metrics:
    """Measure everything in the plan; role 0 is the one that sends first."""
    data, into = await transport.allocate(plan.largest)
    found: Metrics = {}
    for nbytes, count in plan.pingpong:
        await ping_pong(transport, role, data[:nbytes], into[:nbytes], WARM_ROUND_TRIPS)
        _check_arrived(into[:nbytes])
        halves = await ping_pong(transport, role, data[:nbytes], into[:nbytes], count)
        found[f"half_us/{show(nbytes)}"] = statistics.median(halves) * 1e6
        found[f"p99_us/{show(nbytes)}"] = figures.percentile(halves, 0.99) * 1e6
    for nbytes, count in plan.bulk:
        await _one_way(transport, role, data[:nbytes], into[:nbytes], 1)
        if role == 1:
            _check_arrived(into[:nbytes])
        start, cpu = time.perf_counter(), time.process_time()
        await _one_way(transport, role, data[:nbytes], into[:nbytes], count)
        gbytes = nbytes * count / 1e9
        found[f"gbytes_s/{show(nbytes)}"] = gbytes / (time.perf_counter() - start)
        found[f"{_SUMMED}{show(nbytes)}"] = (time.process_time() - cpu) / gbytes
    if plan.windows:
        found["messages_s"] = await _messages_per_second(transport, role, plan, data, into)
        found["messages_s_serial"] = await _messages_per_second(_Serial(transport), role, plan, data, into)
    if plan.idle_s:
        found["idle_cores"] = await _idle_cores(transport, role, plan.idle_s, data[:8], into[:8])
    return found


async def ping_pong(transport: Transport, role: int, data: Array, into: Array, count: int) -> list[float]:
    """Send there and back `count` times; return half of each round trip in seconds."""
    clock, send, recv = time.perf_counter, transport.send, transport.recv
    halves: list[float] = []
    for _ in range(count):
        start = clock()
        if role == 0:
            await send(data)
            await recv(into)
        else:
            await recv(into)
            await send(data)
        halves.append((clock() - start) / 2)
    return halves


async def _one_way(transport: Transport, role: int, data: Array, into: Array, count: int) -> None:
    if role == 0:
        for _ in range(count):
            await transport.send(data)
        await transport.recv(into[:8])
    else:
        for _ in range(count):
            await transport.recv(into)
        await transport.send(data[:8])


class _Serial(Transport):
    """The same transport, with each message awaited before the next one is sent or received."""

    def __init__(self, transport: Transport) -> None:
        self.send, self.recv = transport.send, transport.recv  # type: ignore[method-assign]


async def _messages_per_second(
    transport: Transport, role: int, plan: Plan, data: Array, into: Array
) -> float:
    out = [data[8 * i : 8 * i + 8] for i in range(plan.window)]
    inward = [into[8 * i : 8 * i + 8] for i in range(plan.window)]
    start = time.perf_counter()
    for _ in range(plan.windows):
        if role == 0:
            await transport.send_many(out)
            await transport.recv(into[:8])
        else:
            await transport.recv_many(inward)
            await transport.send(data[:8])
    return plan.windows * plan.window / (time.perf_counter() - start)


async def _idle_cores(transport: Transport, role: int, idle_s: float, data: Array, into: Array) -> float:
    start, cpu = time.perf_counter(), time.process_time()
    if role == 0:
        await transport.pause(idle_s)
        await transport.send(data)
    else:
        await transport.recv(into)
    burnt = (time.process_time() - cpu) / (time.perf_counter() - start)
    if role == 0:
        await transport.recv(into)
    else:
        await transport.send(data)
    return burnt


def _check_arrived(into: Array) -> None:
    if any(int(into[i]) != 1 for i in (0, len(into) // 2, len(into) - 1)):
        raise RuntimeError(f"{len(into)} bytes were received, but are not what was sent")


# ---------------------------------------------------------------- in the child
def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Open the peer, measure, and return what this side found."""
    peer = peers.find(arguments["peer"])
    plan = Plan.from_json(arguments["plan"])

    async def main() -> Metrics:
        transport = await peer.open(role, control)
        if peer.sequence is not None:
            found = await peer.sequence(transport, role, plan, control)
        else:
            found = await sequence(transport, role, plan)
        await transport.finish(control)
        return found

    return run_on(peer.loop, main)


def run_on(loop: Loop, main: Callable[[], Coroutine[Any, Any, T]], spin_s: float = SPIN_S) -> T:
    """Run a coroutine as the peer's programs would; `spin_s` is for our own loop."""
    if loop == "blocking":
        try:
            main().send(None)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        raise RuntimeError("a blocking transport suspended")
    if loop == "uvloop":
        import uvloop

        return uvloop.run(main())
    if loop == "aiocomm":
        import aiocomm

        found: T = aiocomm.run(main(), spin=spin_s)
        return found
    return asyncio.run(main())


# ---------------------------------------------------------------- in the parent
def merge(sender: Metrics, receiver: Metrics) -> Metrics:
    """Return one sample: the sender's clock, the processor time of both, the receiver's idling."""
    merged = dict(sender)
    for key, value in receiver.items():
        if key.startswith(_SUMMED):
            merged[key] = merged.get(key, 0.0) + value
        elif key == "idle_cores":
            merged[key] = value
    return merged


def measure(name: str, options: Options) -> Metrics:
    """Take one sample of a peer."""
    peer = peers.find(name)
    arguments = {"peer": name, "plan": plan_for(options).to_json()}
    program = f"{__name__}:child"
    sender, receiver = pair.run(
        program, arguments, options.timeout_s, environment=peer.environment, launcher=peer.launcher
    )
    return merge(sender, receiver)

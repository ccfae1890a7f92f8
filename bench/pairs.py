"""Suite `pairs`: every peer through the same measuring sequence, two processes, host memory."""

from __future__ import annotations

from . import peers, work
from .model import Column, Options, Rule, Subject, Suite
from .plan import plan_for
from .sizes import show

_UCXX = ("ucxx-best", "ucxx-best-uvloop")
_COPYING = (*_UCXX, "mpi4py", "nixl")
_TCP_BULK = ("blocking-tcp", "buffered-protocol-tcp", "buffered-protocol-tcp-uvloop", "mooncake-tcp")
_TCP_ASYNCIO = ("asyncio-sock-tcp", "asyncio-streams-tcp")
_IDLE = 0.005  # cores; what two decimals show as 0.00


def _subjects(options: Options) -> list[Subject]:
    chosen = (
        [peers.find(name) for name in options.peers] if options.peers else list(peers.registry().values())
    )
    return [Subject(p.name, p.kind, p.wire, p.missing(), p.note) for p in chosen]


def _columns(options: Options) -> list[Column]:
    plan = plan_for(options)
    latency = [Column(f"half_us/{show(n)}", f"half trip\n{show(n)}, µs", 1) for n, _ in plan.pingpong]
    tail = [Column(f"p99_us/{show(n)}", f"p99\n{show(n)}, µs", 1) for n, _ in plan.pingpong[:1]]
    rate = [Column(f"gbytes_s/{show(n)}", f"{show(n)}\nGB/s", 2, "higher") for n, _ in plan.bulk]
    cpu = [Column(f"cpu_s_per_gb/{show(n)}", f"CPU s/GB\n{show(n)}", 3) for n, _ in plan.bulk[-2:]]
    return [
        *latency,
        *tail,
        *rate,
        *cpu,
        Column("messages_s", "k msg/s\n64 open", 0, "higher", 1e-3),
        Column("messages_s_serial", "k msg/s\none by one", 0, "higher", 1e-3),
        Column("idle_cores", "idle\ncores", 2, "neither"),
    ]


def _rules() -> tuple[Rule, ...]:
    shm, spin, empty, tcp = "aiocomm-shm", "aiocomm-shm-spin", "aiocomm-shm-empty", "aiocomm-tcp"
    rules = [
        Rule("half round trip 8 B, sleeping", shm, "half_us/8B", "<=", 1.1, ("handmade-ring",)),
        Rule("half round trip 64 KiB, sleeping", shm, "half_us/64KiB", "<=", 1.0, ("handmade-ring",)),
        Rule("idle cores, sleeping", shm, "idle_cores", "<=", _IDLE),
        Rule("half round trip 8 B, spinning", spin, "half_us/8B", "<=", 1.0, _UCXX),
        Rule("half round trip 64 KiB, spinning", spin, "half_us/64KiB", "<=", 1.0, _UCXX),
        Rule("idle cores once the spin has ended", spin, "idle_cores", "<=", _IDLE),
    ]
    for size in ("64MiB", "1GiB"):
        rules += [
            Rule(f"rate {size}, plain arrays", shm, f"gbytes_s/{size}", ">=", 1.0, _COPYING),
            Rule(
                f"rate {size}, aiocomm.empty()", empty, f"gbytes_s/{size}", ">=", 0.95, ("memcpy-one-thread",)
            ),
            Rule(f"CPU s/GB {size}, plain arrays", shm, f"cpu_s_per_gb/{size}", "<=", 1.0, _COPYING),
        ]
    rules += [
        Rule("messages/s, 64 outstanding", shm, "messages_s", ">=", 3.0, _UCXX),
        Rule("messages/s, 64 outstanding", shm, "messages_s", ">=", 1.0, ("blocking-unix",)),
        Rule("tcp rate 64 MiB", tcp, "gbytes_s/64MiB", ">=", 1.1, _TCP_BULK),
        Rule("tcp rate 1 GiB", tcp, "gbytes_s/1GiB", ">=", 1.1, _TCP_BULK),
        Rule("tcp half round trip 8 B", tcp, "half_us/8B", "<=", 1.05, _TCP_ASYNCIO),
        Rule("idle cores, tcp", tcp, "idle_cores", "<=", _IDLE),
    ]
    return tuple(rules)


SUITE = Suite(
    "pairs",
    "two processes, host memory: latency, rate, messages, processor time",
    _subjects,
    work.measure,
    _columns,
    _rules(),
)

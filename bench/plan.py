"""How much is measured: message sizes in bytes and how many of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .sizes import GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .model import Options

LATENCY_BELOW = 512 * KIB  # smaller sizes are measured by ping-pong, larger ones by rate


@dataclass(frozen=True)
class Plan:
    """What the measuring sequence does.

    Args:
        pingpong: (nbytes, round trips) each.
        bulk: (nbytes, messages) each.
        windows: How many times `window` messages of 8 bytes are sent before an answer comes.
        idle_s: How long a receive is left pending.
    """

    pingpong: tuple[tuple[int, int], ...] = ((8, 2000), (KIB, 2000), (64 * KIB, 1000))
    bulk: tuple[tuple[int, int], ...] = ((MIB, 300), (64 * MIB, 16), (GIB, 3))
    windows: int = 200
    window: int = 64
    idle_s: float = 1.0

    @property
    def largest(self) -> int:
        return max(n for n, _ in (*self.pingpong, *self.bulk, (8 * self.window, 0)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        pairs = {key: tuple((n, k) for n, k in data[key]) for key in ("pingpong", "bulk")}
        return Plan(**{**data, **pairs})


QUICK = Plan(
    pingpong=((8, 500), (KIB, 500), (64 * KIB, 300)),
    bulk=((MIB, 100), (64 * MIB, 6)),
    windows=50,
    idle_s=0.3,
)


def plan_for(options: Options) -> Plan:
    """Return the plan that the command line chose."""
    plan = QUICK if options.quick else Plan()
    if not options.sizes:
        return plan
    counts = dict((*Plan().pingpong, *Plan().bulk))
    scale = 4 if options.quick else 1

    def count(nbytes: int) -> int:
        usual = 1000 if nbytes < LATENCY_BELOW else max(3, min(300, 2 * GIB // nbytes))
        return max(3, counts.get(nbytes, usual) // scale)

    chosen = [(n, count(n)) for n in sorted(set(options.sizes))]
    return Plan(
        pingpong=tuple(c for c in chosen if c[0] < LATENCY_BELOW),
        bulk=tuple(c for c in chosen if c[0] >= LATENCY_BELOW),
        windows=plan.windows,
        idle_s=plan.idle_s,
    )

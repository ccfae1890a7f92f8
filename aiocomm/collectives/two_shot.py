"""All-reduce of small GPU arrays: each rank's kernel reduces its block of all arrays, and writes it to all.

One launch and two messages per pair, where the schedules of copies and kernels take several of each. Ranks
offer their arrays with the headers of a call that was prepared; where not all do, it is made by messages on
all ranks. Blocks are read and written by one rank's kernel each, so no kernel waits for another, every rank
gets the same bits, and input and output may be one array.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aiocomm.collectives.plan import Plan
from aiocomm.collectives.steps import TMP, Recv, Send, Span, Together

if TYPE_CHECKING:
    from aiocomm._device import Description
    from aiocomm._operations import Operations
    from aiocomm.collectives.steps import Step
    from aiocomm_native._core import PreparedCall

__all__ = ["MOST_BYTES", "Offered", "two_shot"]

MOST_BYTES: Final = 8 << 20  # of an array: more is faster by copy engines
_WORD: Final = Span(TMP, 0, 0)


def two_shot(rank: int, size: int) -> Plan:
    """One rank's part: its kernel, then a word to and from every other rank that theirs are over, too."""
    steps: tuple[Step | Together, ...] = (
        Together(),
        *(Send((rank + away) % size, _WORD) for away in range(1, size)),
        *(Recv((rank - away) % size, _WORD) for away in range(1, size)),
    )
    sends = range(1, size)
    receives = range(size, 2 * size - 1)
    count = len(steps)
    return Plan(
        "all_reduce",
        "two_shot",
        steps,
        0,
        waits=tuple(int(step in sends) for step in range(count)),
        followers=(tuple(sends), *((),) * (count - 1)),
        numbers=(0,) * count,
        first=(0, *receives),
        reduced=(False,) * count,
        eager=None,
    )


@dataclass(frozen=True, slots=True)
class Offered:
    """A call whose arrays were offered, or are not known to be.

    Args:
        declined: it is made by messages.
        plan: of the other way.
    """

    comm: Operations
    call: PreparedCall
    given: Description | None
    out: Description
    plan: Plan
    declined: bool

    def by_all(self, slots: Any) -> bool:
        """Whether all ranks have offered theirs, now that all headers have come."""
        return not self.declined and self.call.all_offered(slots)

    def launch(self, slots: Any) -> Any:
        """Start this rank's kernel: a transfer, or None where it has none."""
        return self.call.launch(self.comm._engine, self.given, self.out, slots)

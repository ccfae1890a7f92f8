"""All-reduce of small GPU arrays: each rank's kernel reduces its block of all arrays, and writes it to all.

One launch and a few words per pair, where the schedules of copies and kernels take several launches. Ranks
offer their arrays with the headers of a call that was prepared; where not all do, it is made by messages on
all ranks. Blocks are read and written by one rank's kernel each, so no kernel waits for another, every rank
gets the same bits, and input and output may be one array.

Rules, so that nothing touches an array after its rank's call:
- A rank launches once every other has said `go`: it has seen all offers, and stays. Without having said so
  it may leave whenever it likes.
- A rank that has said it stays until every other is over: has said `done`, has given the call up, or is gone.
- Whoever offered and fails tells all others so, but not before its own kernel is over.
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

__all__ = ["Offered", "pays", "two_shot"]

_MOST_BYTES: Final = 8 << 20  # of an array of two ranks, beyond which copy engines beat a few multiprocessors
_MANY_SMS: Final = 16
_WORD: Final = Span(TMP, 0, 0)


def two_shot(rank: int, size: int) -> Plan:
    """One rank's part: `go` to and from all others, its kernel, and `done` to and from all others."""
    others = range(1, size)
    sends = tuple(Send((rank + away) % size, _WORD) for away in others)
    receives = tuple(Recv((rank - away) % size, _WORD) for away in others)
    steps: tuple[Step | Together, ...] = (*sends, *receives, Together(), *sends, *receives)
    count, kernel = len(steps), 2 * (size - 1)
    after = tuple(range(kernel + 1, kernel + size))
    awaited = range(size - 1, kernel)
    return Plan(
        "all_reduce",
        "two_shot",
        steps,
        0,
        waits=tuple(len(awaited) if step == kernel else int(step in after) for step in range(count)),
        followers=tuple(
            after if step == kernel else (kernel,) if step in awaited else () for step in range(count)
        ),
        numbers=tuple(int(step > kernel) for step in range(count)),
        first=(*range(kernel), *range(kernel + size, count)),
        reduced=(False,) * count,
        eager=None,
    )


def pays(size: int, nbytes: int, sm_budget: int) -> bool:
    """Whether it beats copy engines, whose copies each rank reduces."""
    return size > 2 or nbytes <= _MOST_BYTES or sm_budget >= _MANY_SMS


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

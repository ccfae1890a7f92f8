"""Link executors as users see them: what is submitted, what completes, and counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NoReturn

from aiocomm._queues import Broadcast
from aiocomm.errors import UsageError, UsageTypeError
from aiocomm.statistics import LinkStatistics
from aiocomm.types import Completion, Submission
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiocomm.types import Feed
    from aiocomm_native._core import Engine

__all__ = ["LEFT_OUT", "LinkHandle", "check_links"]

LEFT_OUT: Final = {
    "rdma": (
        "it was built without the headers of libibverbs (infiniband/verbs.h)",
        "install them (Debian, Ubuntu: apt install libibverbs-dev) and build again (pip install .)",
    ),
}
"""Links that a build may be without: why, and what to do."""


def check_links(names: Iterable[str]) -> None:
    """Refuse, by a UsageError, a link that this build does not have."""
    for name in sorted(set(names) - set(_core.available_links())):
        built = ", ".join(link for link in _core.available_links() if link != "self")
        if name in LEFT_OUT:
            raise UsageError(f"this build has no link {name!r}, only {built}: {'; '.join(LEFT_OUT[name])}")
        raise UsageError(f"unknown link {name!r}: this build has {built}")


class LinkHandle:
    """One link's executor. `comm.links["shm"]`.

    Observing costs a little per operation, and only while there is an iterator; close it with `aclose()`, or
    let it go.
    """

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self._engine = engine
        self._submissions: Broadcast[Submission] = Broadcast(lambda: engine.on_submit(name, None))
        self._completions: Broadcast[Completion] = Broadcast(lambda: engine.on_complete(name, None))

    def submissions(self) -> Feed[Submission]:
        """Operations that this process submits from now on, as they are submitted.

        An operation shows on the link that its peer has or has had; with a peer that was never connected, and
        of any source, on the first that is enabled. It may end on another.
        """
        box = self._submissions.subscribe()
        self._engine.on_submit(self.name, self._submitted)
        return box

    def completions(self) -> Feed[Completion]:
        """Operations that end on this link from now on, as they end, in whichever way."""
        box = self._completions.subscribe()
        self._engine.on_complete(self.name, self._completed)
        return box

    def statistics(self) -> LinkStatistics:
        """Counters of this link, as of now."""
        return LinkStatistics.collect(self._engine, self.name)

    def _submitted(self, *fields: Any) -> None:
        self._submissions.publish(Submission(*fields))

    def _completed(
        self, op: int, kind: str, peer: int, channel: str, nbytes: int, ok: int, queued: float, moved: float
    ) -> None:
        self._completions.publish(Completion(op, kind, peer, channel, nbytes, bool(ok), queued, moved))

    def _close(self) -> None:
        self._submissions.close()
        self._completions.close()

    def __reduce__(self) -> NoReturn:
        raise UsageTypeError(
            f"the link {self.name!r} stays in its process: it cannot be pickled or copied. Send its name, or "
            "what its statistics() returns"
        )

    def __repr__(self) -> str:
        return f"<aiocomm link {self.name}>"

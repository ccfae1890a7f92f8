"""Control planes without native code, for tests: an engine that only records, and a member that runs on it.

`python -m aiocomm._control.testing ADDRESS RANK SIZE` is such a member in a process of its own (rank or size
`-` for none): it says `ready RANK GENERATION` once it has joined, `watches RANK` once it holds a connection
of the vigil, `lost RANK REASON` of each lost peer, and leaves at the end of its input.
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar
from unittest import mock

from aiocomm._control import plane
from aiocomm._control.plane import ControlPlane, Welcome
from aiocomm._control.vigil import Vigil
from aiocomm.config import Settings, resolve_world
from aiocomm.errors import LinkError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiocomm._control.messages import PeerCard
    from aiocomm._control.stream import Stream
    from aiocomm.types import Event

__all__ = ["Attachment", "Member", "RecordingEngine"]

_T = TypeVar("_T")
_PATIENCE_S: Final = 30.0


@dataclass
class Attachment:
    """One call of `attach`."""

    rank: int
    generation: int
    link: str
    fds: list[int]
    peer_card: bytes
    initiator: bool


@dataclass
class RecordingEngine:
    """Takes what the control plane gives, and can be waited on.

    Args:
        links: name to (kind, streams), cheapest first.
        broken: links whose attach fails.
        label: goes into the link cards, and is written to each descriptor as soon as it is attached.
    """

    links: dict[str, tuple[str, int]] = field(default_factory=lambda: {"shm": ("unix", 1), "tcp": ("tcp", 3)})
    broken: frozenset[str] = frozenset()
    label: bytes = b""
    identity: tuple[int, int] | None = None
    is_open: bool = False
    peers: dict[int, int] = field(default_factory=dict)
    attached: dict[int, Attachment] = field(default_factory=dict)
    started: dict[int, str] = field(default_factory=dict)
    detached: list[tuple[int, str]] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    broken_pairs: set[int] = field(default_factory=set)
    lost: dict[tuple[int, int], str] = field(default_factory=dict)
    left: list[tuple[int, int]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()

    def wait(self, condition: Callable[[RecordingEngine], _T], timeout_s: float = _PATIENCE_S) -> _T:
        """Block until the condition gives something true, and return that.

        Raises:
            TimeoutError: it did not within `timeout_s`.
        """
        with self._changed:
            found = self._changed.wait_for(lambda: condition(self), timeout_s)
            if not found:
                raise TimeoutError(f"not within {timeout_s} s: {self}")
            return found

    def close(self) -> None:
        """Close all descriptors that were handed over."""
        with self._changed:
            for attachment in self.attached.values():
                for descriptor in attachment.fds:
                    os.close(descriptor)
            self.attached.clear()

    def set_identity(self, rank: int, generation: int) -> None:
        """Record it."""
        self._note(lambda: setattr(self, "identity", (rank, generation)))

    def set_open(self, is_open: bool) -> None:
        """Record it."""
        self._note(lambda: setattr(self, "is_open", is_open))

    def link_names(self) -> list[str]:
        """The links given."""
        return list(self.links)

    def link_streams(self, link: str) -> tuple[str, int]:
        """The needs given."""
        return self.links[link]

    def link_card(self, link: str) -> bytes:
        """Recognisable on the other side."""
        return self.label + link.encode()

    def add_peer(self, rank: int, generation: int) -> None:
        """Record it."""
        self._note(lambda: self.peers.__setitem__(rank, generation))

    def attach(
        self, rank: int, generation: int, link: str, fds: list[int], peer_card: bytes, initiator: bool
    ) -> None:
        """Record it, or fail as asked."""
        if link in self.broken:
            for descriptor in fds:
                os.close(descriptor)
            raise LinkError(f"{link} is broken here")
        before = self.attached.get(rank)
        same = before is not None and before.generation == generation and before.link == link
        if same and rank not in self.broken_pairs:
            raise AssertionError(f"rank {rank} attached twice")
        try:
            for descriptor in fds:
                os.write(descriptor, self.label)
        except OSError:  # the other end is gone already
            for descriptor in fds:
                os.close(descriptor)
            raise
        for descriptor in before.fds if before is not None else ():
            os.close(descriptor)
        attachment = Attachment(rank, generation, link, fds, peer_card, initiator)
        self._note(lambda: self.attached.__setitem__(rank, attachment))

    def start_pair(self, rank: int, generation: int) -> None:
        """Record which link was started."""
        attachment = self.attached[rank]
        assert attachment.generation == generation

        def start() -> None:
            self.started[rank] = attachment.link
            self.broken_pairs.discard(rank)

        self._note(start)

    def pair_state(self, rank: int, generation: int) -> str:
        """Started, and not broken since."""
        with self._changed:
            attachment = self.attached.get(rank)
            if attachment is None or attachment.generation != generation or rank in self.broken_pairs:
                return "failed"
            return "up" if self.started.get(rank) == attachment.link else "failed"

    def break_pair(self, rank: int) -> None:
        """As if its link had failed."""
        self._note(lambda: self.broken_pairs.add(rank))

    def detach(self, rank: int, generation: int) -> None:
        """Take back what was attached, if that is so."""
        with self._changed:  # whoever waits looks more than once
            attachment = self.attached.pop(rank, None)
        if attachment is None:
            return
        assert attachment.generation == generation
        for descriptor in attachment.fds:
            os.close(descriptor)
        self._note(lambda: self.detached.append((rank, attachment.link)))

    def fail_connect(self, rank: int, reason: str) -> None:
        """Record it."""
        self._note(lambda: self.failed.__setitem__(rank, reason))

    def lose_peer(self, rank: int, generation: int, reason: str) -> None:
        """Record it."""
        self._note(lambda: self.lost.__setitem__((rank, generation), reason))

    def leave_peer(self, rank: int, generation: int) -> None:
        """Record it."""
        self._note(lambda: self.left.append((rank, generation)))

    def on_event(self, event: Event) -> None:
        """Record it."""
        self._note(lambda: self.events.append(event))

    def _note(self, change: Callable[[], object]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()


class Member:
    """A control plane over a recording engine.

    Args:
        address: of the world, None for a world of one.
        rank: as for `connect`.
        size: as for `connect`.
        engine: a fresh one if None.
        settings: defaults if None.
        options: further fields of the world: token, name, timeout_s.
    """

    def __init__(
        self,
        address: str | None,
        rank: int | None = None,
        size: int | None = None,
        *,
        engine: RecordingEngine | None = None,
        settings: Settings | None = None,
        **options: Any,
    ) -> None:
        self.engine = engine or RecordingEngine(label=b"%d:" % (rank if rank is not None else -1))
        world = resolve_world(address, rank=rank, size=size, env={}, **{"timeout_s": _PATIENCE_S, **options})
        self.plane = ControlPlane(world, self.engine, settings or Settings(), self.engine.on_event)
        self.joining = self.plane.start()

    def joined(self) -> Welcome:
        """Wait until the world is complete."""
        return self.joining.result(_PATIENCE_S)

    def close(self) -> None:
        """Leave, wait until that is done, and close what the engine was given."""
        self.plane.close().result(_PATIENCE_S)
        self.plane.join(_PATIENCE_S)
        self.engine.close()


class _TellingEngine(RecordingEngine):
    """Says which peers are lost."""

    def lose_peer(self, rank: int, generation: int, reason: str) -> None:
        """Record it, and say so."""
        print("lost", rank, reason, flush=True)
        super().lose_peer(rank, generation, reason)


class _TellingVigil(Vigil):
    """Says whom it watches."""

    async def _hold(self, stream: Stream, card: PeerCard) -> None:
        print("watches", card.rank, flush=True)
        await super()._hold(stream, card)


def _main(address: str, rank: str, size: str) -> None:
    token = resolve_world(address).token
    mock.patch.object(plane, "Vigil", _TellingVigil).start()
    member = Member(
        address,
        int(rank) if rank != "-" else None,
        int(size) if size != "-" else None,
        engine=_TellingEngine(),
        settings=Settings.from_environment(),
        token=token,
    )
    welcome = member.joined()
    print("ready", welcome.rank, welcome.generation, flush=True)
    sys.stdin.read()
    member.close()


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""Who belongs to a world. Pure: calls in, announcements out; no sockets, no clock.

Rules:
1. A fixed world has `size` ranks. Each process says which one it is; a rank that is taken is refused. The
   world is ready once each rank has been taken; it stays ready when some are lost.
2. An elastic world deals out ranks 0, 1, 2, … up to `MAX_RANKS`, and never deals one out again. It is ready
   at once; or, if rank 0 is reserved for the process that hosts the rendezvous, once that has come, so that
   all know it.
3. A rank that was lost or left a fixed world may be taken again: that is a new generation. Generations of a
   rank only grow. They start at a number that differs between worlds, so that a handle from an earlier world
   is stale in this one.
4. Leaving and being lost are final for that generation, and happen once.

An illegal call raises and changes nothing.

    (absent) ──admit──► present ──leave / lose──► absent ──admit (fixed worlds)──► present, next generation
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from aiocomm._control.wire import MAX_ITEMS
from aiocomm._world import MAX_RANKS, NAME_LIMIT
from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiocomm._control.messages import PeerCard

__all__ = ["Announcement", "Became", "Came", "JoinRefusedError", "Membership", "Went"]


class JoinRefusedError(UsageError):
    """A process may not join as it asked. With `retry`, it may later."""

    def __init__(self, message: str, retry: bool = False) -> None:
        super().__init__(message)
        self.retry = retry


@dataclass(frozen=True, slots=True)
class Came:
    """A process is in."""

    card: PeerCard


@dataclass(frozen=True, slots=True)
class Went:
    """A process is out. `graceful` means that it said so."""

    card: PeerCard
    graceful: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Became:
    """The world is ready: everyone that it was made for has come."""


Announcement: TypeAlias = Came | Went | Became


class Membership:
    """The members of one world, as the rendezvous keeps them.

    Args:
        size: number of ranks, or None for an elastic world.
        first_generation: where generations start; different for each world.
        reserve_zero: elastic only: rank 0 goes to the host of the rendezvous, which asks for it.
    """

    def __init__(self, size: int | None, first_generation: int = 1, reserve_zero: bool = False) -> None:
        if size is not None and size < 1:
            raise UsageError(f"a world of size {size} has no member")
        self.size = size
        self.ready = size is None and not reserve_zero
        self._first_generation = first_generation
        self._present: dict[int, PeerCard] = {}
        self._generations: dict[int, int] = {}
        self._next_rank = 1 if size is None and reserve_zero else 0
        self._zero_reserved = size is None and reserve_zero

    def __iter__(self) -> Iterator[PeerCard]:
        return iter(sorted(self._present.values(), key=lambda card: card.rank))

    def __len__(self) -> int:
        return len(self._present)

    def missing(self) -> list[int]:
        """Ranks of a fixed world that nobody has now."""
        return [rank for rank in range(self.size or 0) if rank not in self._present]

    def admit(
        self, rank: int | None, size: int | None, card: PeerCard
    ) -> tuple[PeerCard, list[Announcement]]:
        """Let a process in. Returns its card with rank and generation, and what to tell everyone (it
        included).

        Raises:
            JoinRefusedError: the world differs from what it asked for, or its rank is taken.
        """
        if card.name is not None and len(card.name) > NAME_LIMIT:
            raise JoinRefusedError(f"a name of {len(card.name)} characters is too long")
        if len(card.links) > MAX_ITEMS:
            raise JoinRefusedError("too many links")
        rank = self._elastic_rank(rank, size) if self.size is None else self._fixed_rank(rank, size)
        holder = self._present.get(rank)
        if holder is not None:
            raise JoinRefusedError(
                f"rank {rank} is taken by process {holder.pid} on {holder.host}; "
                "start each process with a rank of its own",
                # No two communicators listen at the same: it asks again since its connection broke, of which
                # there will be word here too.
                retry=bool(card.addresses) and card.addresses == holder.addresses,
            )
        generation = self._generations.get(rank, self._first_generation - 1) + 1
        card = replace(card, rank=rank, generation=generation)
        self._generations[rank] = generation
        self._present[rank] = card
        if self.size is None and rank == self._next_rank:
            self._next_rank += 1
        if rank == 0:
            self._zero_reserved = False
        announcements: list[Announcement] = [Came(card)]
        complete = rank == 0 if self.size is None else len(self._present) == self.size
        if not self.ready and complete:
            self.ready = True
            announcements.append(Became())
        return card, announcements

    def leave(self, rank: int, generation: int) -> list[Announcement]:
        """A member said goodbye. Returns what to tell the others; nothing if it was out already."""
        return self._out(rank, generation, True, "left")

    def lose(self, rank: int, generation: int, reason: str) -> list[Announcement]:
        """A member is dead or cannot be reached. Returns what to tell the others; nothing if it was out
        already.
        """
        return self._out(rank, generation, False, reason)

    def _out(self, rank: int, generation: int, graceful: bool, reason: str) -> list[Announcement]:
        card = self._present.get(rank)
        if card is None or card.generation != generation:
            return []
        del self._present[rank]
        return [Went(card, graceful, reason)]

    def _fixed_rank(self, rank: int | None, size: int | None) -> int:
        if size is None or rank is None:
            raise JoinRefusedError(
                f"this world has a fixed size of {self.size}: connect with rank= and size="
            )
        if size != self.size:
            raise JoinRefusedError(f"rank {rank} expects {size} processes, but this world has {self.size}")
        if not 0 <= rank < size:
            raise JoinRefusedError(f"rank {rank} is not within a world of {size}")
        return rank

    def _elastic_rank(self, rank: int | None, size: int | None) -> int:
        if size is not None:
            raise JoinRefusedError(
                f"this world is elastic: connect without rank= and size= (got size {size})"
            )
        if rank is None and self._next_rank == MAX_RANKS:
            raise JoinRefusedError(
                f"this world has dealt out all of its {MAX_RANKS} ranks: start a new one, and its rendezvous"
            )
        if rank is None:
            return self._next_rank
        if rank == 0 and self._zero_reserved:
            return 0
        raise JoinRefusedError(
            "this world is elastic: its rendezvous deals out the ranks; connect without rank="
        )

"""Groups: some ranks of a world, with their own numbers, order of calls and tag space."""

from __future__ import annotations

import hashlib
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm._control.host import hostname
from aiocomm._numbers import integer
from aiocomm._operations import limit_of
from aiocomm.collectives import closing
from aiocomm.collectives.agreement import Agreement
from aiocomm.collectives.movements import swapped
from aiocomm.collectives.operations import Collectives
from aiocomm.collectives.requests import barrier
from aiocomm.collectives.scope import Scope
from aiocomm.errors import ClosedError, PeerLostError, UsageError, UsageTypeError
from aiocomm.moe.operations import ExpertOperations
from aiocomm.types import Priority

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiocomm._loop.backend import Backend
    from aiocomm.channel import Channel
    from aiocomm.communicator import Communicator

__all__ = ["Group"]


class Group(Collectives, ExpertOperations):
    """Some ranks of a world. Made by `comm.group`, `split` and `shrink`; has all collective operations.

    Groups may overlap, and do not order or block each other. A member that is lost fails the operations of
    its groups only: `shrink` goes on with the rest.
    """

    def __init__(self, comm: Communicator, ranks: Sequence[int], identity: str) -> None:
        self._comm = comm
        self._ranks = tuple(ranks)
        self._rank = self._ranks.index(comm.rank)
        self._size = len(self._ranks)
        self._incarnations = [comm._generation_of(rank) for rank in self._ranks]
        self._digest = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
        self._scopes: dict[str, Scope] = {}
        self._expert_scopes: dict[str, tuple[Scope, int]] = {}
        self._plans: dict[Any, Any] = {}
        self._splits = 0
        self._shrinks = 0
        self._given_up: list[Agreement] = []  # of shrinks, with which later ones go on
        self._shrinking: set[Agreement] = set()  # under way
        self._closed = False
        self._indices: list[int] = []  # of its channels
        self._at_end = weakref.finalize(
            self, _collected, comm._backend, partial(_close_channels, weakref.ref(comm), self._indices)
        )
        self._at_end.atexit = False
        self._link: str | None = None
        self._hosts: tuple[int, ...] | None = None
        whole = self._ranks == tuple(range(len(self._ranks)))
        self.names = [
            f"rank {r}" + ("" if whole else f" (rank {w} of the world)") for r, w in enumerate(ranks)
        ]

    @classmethod
    def world(cls, comm: Communicator) -> Group:
        """All ranks of a world of fixed size."""
        if comm._size is None:
            raise UsageError(
                "a world without a fixed size has no collectives of its own: use comm.group([...])"
            )
        ranks = range(comm._size)
        return cls(comm, ranks, f"world {_generations(comm, ranks)}")

    @classmethod
    async def create(cls, comm: Communicator, ranks: Sequence[int], deadline: float | None) -> Group:
        """The group of these ranks; all of them call it."""
        if comm._closed or not comm._here():
            comm._refuse()
        try:
            given = list(ranks)
        except TypeError:
            raise UsageTypeError(f"ranks={ranks!r}: a list of the members' ranks") from None
        members = tuple(integer("rank", rank) for rank in given)
        if len(set(members)) != len(members):
            raise UsageError(f"a rank comes twice in {list(members)}")
        for rank in members:
            if not 0 <= rank < comm._ranks:
                comm._refuse(dst=rank)
        if comm.rank not in members:
            raise UsageError(f"rank {comm.rank} is not one of {list(members)}: only members make a group")
        limit_of(deadline)  # refuses; a number that one member skips would keep later groups apart
        who = _generations(comm, members)
        while True:
            number = comm._groups[who] = comm._groups.get(who, 0) + 1
            group = cls(comm, members, f"group {who} {number}")
            if not group._scope(None).is_given_up(1):
                break
            group.close()  # a member did not wait so long, and tries again by the next number
        await group._meet(deadline)
        return group

    async def _meet(self, deadline: float | None) -> None:
        try:
            await self._collect("group", lambda _: barrier("group"), None, deadline)
        except BaseException:
            self.close()
            raise

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._rank

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return self._size

    @property
    def ranks(self) -> tuple[int, ...]:
        """The members' ranks in the world, by their rank in the group."""
        return self._ranks

    def close(self) -> None:
        """End this rank's operations in the group with `ClosedError`. Idempotent.

        What other ranks wait for this one to do, or have it do next on a channel that it has used, ends with
        `TransferCancelled`. Channels that its calls were given stay open, being the communicator's; the
        native ones that it has made for itself on them are closed once the others were told, or after five
        seconds for those who do not listen. Closing is optional: a group that nobody has any more, and whose
        calls have ended, closes by itself.
        """
        if self._closed:
            return
        self._closed = True
        self._at_end.detach()
        for scope in self._scopes.values():
            scope.forget(all_memory=True)
        if not self._comm.closed:
            for scope in self._scopes.values():
                closing.close(scope, [scope.index])
            for agreement in self._given_up:
                agreement.close()
            for agreement in self._shrinking:
                agreement.stop(f"{self.label} was closed")
            for scope, rows in self._expert_scopes.values():
                # Others may ask whether calls have ended, which read memory of theirs.
                closing.close(scope, [rows] if scope.pools else [scope.index, rows])
                scope.let_go()

    @property
    def closed(self) -> bool:
        """Whether the group was closed."""
        return self._closed

    @property
    def label(self) -> str:
        """The group, for messages."""
        return f"group {list(self._ranks)}"

    @property
    def link(self) -> str:
        """Class of the links among the members, as all of them see it: "shm" or "tcp"."""
        if self._link is None:
            self._link = self._find_link()
        return self._link

    @property
    def hosts(self) -> tuple[int, ...]:
        """A number for the host of each member, as all of them see it; empty if all are on one."""
        if self._hosts is None:
            comm = self._comm
            names = [hostname() if rank == comm.rank else comm._peers[rank].host for rank in self._ranks]
            numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
            self._hosts = tuple(numbers[name] for name in names) if len(numbers) > 1 else ()
        return self._hosts

    def name_of(self, rank: int) -> str:
        """A world rank, for messages."""
        return self.names[self._ranks.index(rank)] if rank in self._ranks else f"rank {rank} of the world"

    def _find_link(self) -> str:
        # Only what every member knows alike may count: all must choose the same algorithms.
        comm = self._comm
        others = [comm._peers[rank] for rank in self._ranks if rank != comm.rank]
        hosts = {peer.host for peer in others} | {hostname()}
        links = set(comm._engine.link_names()).intersection(*(peer.links for peer in others))
        return "shm" if len(hosts) == 1 and "shm" in links else "tcp"

    def _members(self) -> Group:
        return self

    async def _split(self, color: int | None, key: int, deadline: float | None) -> Group | None:
        self._splits += 1
        mine = np.array([-1 if color is None else color, key, self._splits], np.int64)
        everyone = np.empty((self.size, 3), np.int64)
        await self._collect("split", lambda g: swapped(g, "split", everyone, mine), None, deadline)
        number = int(everyone[:, 2].max())  # some may have given up more splits before than others
        self._splits = max(self._splits, number)
        if color is None:
            return None
        chosen = [(int(k), r) for r, (c, k, _) in enumerate(everyone) if c == color]
        ranks = [self._ranks[r] for _, r in sorted(chosen)]
        return Group(self._comm, ranks, f"split {self._digest} {number} {color}")

    async def _shrink(self, deadline: float | None) -> Group:
        comm = self._comm
        self._check(None)
        limit_of(deadline)
        alive = [r for r in self._ranks if r == comm.rank or (comm._peers[r].alive and self._is_member(r))]
        if self._given_up:
            agreement = self._given_up.pop(0)
            self._indices.remove(agreement.index)
        else:
            self._shrinks += 1
            name = f"\0shrink {self._digest} {self._shrinks}"  # unlike that of any scope
            index = comm._engine.open_channel(name, int(Priority.HIGH), 1.0)
            agreement = Agreement(comm, index, self._ranks, alive, self._shrinks)
        self._shrinking.add(agreement)
        try:
            left = await agreement.reach(deadline)
        except PeerLostError:
            agreement.close()
            raise
        except BaseException:
            self._given_up.append(agreement)  # the others may have heard of it
            self._indices.append(agreement.index)
            if self._closed:
                agreement.close()
            raise
        finally:
            self._shrinking.discard(agreement)
        agreement.close()
        return Group(comm, left, f"shrink {self._digest} {agreement.epoch} {left}")

    def _scope(self, channel: Channel | None) -> Scope:
        self._check(channel)
        name = "" if channel is None else channel.name
        scope = self._scopes.get(name)
        if scope is None:
            priority, weight = (channel.priority, channel.weight) if channel else (Priority.NORMAL, 1.0)
            index = self._comm._engine.open_channel(f"\0group {self._digest} {name}", int(priority), weight)
            self._indices.append(index)
            scope = self._scopes[name] = Scope(self._comm, self, index)
            scope.channel = channel
        self._use(scope, channel)
        return scope

    def _expert_scope(self, channel: Channel | None) -> tuple[Scope, int]:
        """The urgent channel of dispatch and combine, and the one for rows that follow."""
        self._check(channel)
        name = "" if channel is None else channel.name
        found = self._expert_scopes.get(name)
        if found is None:
            priority, weight = (channel.priority, channel.weight) if channel else (Priority.NORMAL, 1.0)
            open_channel = self._comm._engine.open_channel
            urgent = open_channel(
                f"\0experts {self._digest} {name}", int(max(priority, Priority.HIGH)), weight
            )
            bulk = open_channel(f"\0rows {self._digest} {name}", int(priority), weight)
            self._indices += [urgent, bulk]
            found = self._expert_scopes[name] = Scope(self._comm, self, urgent), bulk
            found[0].channel = channel
            found[0].rows = bulk
        self._use(found[0], channel)
        return found

    def _use(self, scope: Scope, channel: Channel | None) -> None:
        """Refuse a scope whose channel is closed; go on with one whose channel is open again."""
        if channel is None:
            return
        if channel.closed:
            closing.refuse(scope, channel)
        if scope.channel is not channel:
            closing.resume(scope, channel)

    def _is_member(self, rank: int) -> bool:
        """Whether who has a rank of the group now is who had it when the group was made."""
        return self._comm._generation_of(rank) == self._incarnations[self._ranks.index(rank)]

    def _is_lost(self, rank: int) -> bool:
        """Whether a member is gone without having said goodbye, or has been replaced."""
        comm = self._comm
        if rank == comm.rank or rank not in self._ranks:
            return False
        return not self._is_member(rank) or not (comm._peers[rank].alive or rank in comm._left)

    def _check(self, channel: Channel | None) -> None:
        comm = self._comm
        if comm._closed or not comm._here():
            comm._refuse()
        if self._closed:
            raise ClosedError(f"{self.label} was closed")
        if channel is not None:
            comm._index_of(channel)

    def __repr__(self) -> str:
        return f"<aiocomm.Group rank={self.rank} of {list(self._ranks)}>"


def _collected(backend: Backend, close: Callable[[], object]) -> None:
    # On whatever thread, and in the middle of whatever: what it had is closed by the loop, soon.
    backend.call_threadsafe(close)


def _close_channels(owner: weakref.ref[Communicator], indices: list[int]) -> None:
    comm = owner()
    if comm is None or comm.closed:
        return
    for index in indices:
        comm._engine.close_channel(index, for_good=True)  # their names have the group's number
    comm._engine.drain()


def _generations(comm: Communicator, ranks: Sequence[int]) -> str:
    """Who they are: a rank that comes back is another.

    Raises:
        PeerLostError: one was gone before this process joined, and so nothing is known of it.
    """
    generations = [comm._generation_of(rank) for rank in ranks]
    for rank, generation in zip(ranks, generations, strict=True):
        if generation is None:
            raise PeerLostError(f"rank {rank} is gone, since before this process joined: leave it out", rank)
    return " ".join(f"{rank}.{generation}" for rank, generation in zip(ranks, generations, strict=True))

"""Hierarchical: first within each host, then between hosts, then within each host again.

Where ranks of a host share its network adapter, what several of them need crosses the network once. Ranks of
one place on their hosts form a lane; there are as many lanes as the smallest host has ranks, and each lane
carries its part of the data between hosts, so that all of a host's ranks work. Ranks beyond the lanes take
part within their host only.

The schedules are those of other files, one after the other, on some of the ranks and some of the bytes; what
may overlap follows from the bytes, as always. Reductions have one order: that of the ranks within a host,
then that of the hosts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from aiocomm.collectives import direct, pipelined
from aiocomm.collectives.steps import (
    IN,
    OUT,
    TMP,
    Copy,
    Problem,
    Recv,
    Reduce,
    Schedule,
    Send,
    Span,
    Step,
    blocks,
    even,
    pieces,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aiocomm.collectives.steps import Name

    Places = Mapping[Name, tuple[Name, int]]

__all__ = ["all_gather", "all_reduce", "broadcast", "reduce", "reduce_scatter", "useful"]


def useful(hosts: Sequence[int]) -> bool:
    """Whether there are several hosts, and one of them has several ranks."""
    return 1 < len(set(hosts)) < len(hosts)


class _World:
    """The ranks by host, seen from one of them."""

    def __init__(self, p: Problem) -> None:
        self.hosts = [[r for r in range(p.size) if p.hosts[r] == host] for host in dict.fromkeys(p.hosts)]
        self.mine = next(host for host in self.hosts if p.rank in host)
        self.place = self.mine.index(p.rank)
        self.lanes = min(map(len, self.hosts))
        self.lane = [host[self.place] for host in self.hosts] if self.place < self.lanes else []

    def carrier(self, rank: int, host: Sequence[int]) -> int:
        """Who on a host deals with what belongs to a rank of any host."""
        own = next(one for one in self.hosts if rank in one)
        return host[own.index(rank) % self.lanes]


class _Phases:
    """Collects the schedules of phases, each with scratch memory of its own."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.scratch = 0

    def reserve(self, nbytes: int) -> int:
        """Scratch memory that a phase leaves for a later one."""
        start, self.scratch = self.scratch, self.scratch + nbytes
        return start

    def add(self, schedule: Schedule, ranks: Sequence[int], places: Places) -> None:
        """Append a schedule of some ranks.

        Args:
            ranks: theirs, by their number in the schedule.
            places: which buffer each of its buffers is, from which byte on.
        """
        where = {TMP: (TMP, self.reserve(schedule.scratch)), **places}

        def moved(span: Span) -> Span:
            buffer, start = where[span.buffer]
            return Span(buffer, start + span.start, start + span.stop)

        for step in schedule.steps:
            match step:
                case Send(peer, source):
                    self.steps.append(Send(ranks[peer], moved(source)))
                case Recv(peer, target):
                    self.steps.append(Recv(ranks[peer], moved(target)))
                case Copy(target, source):
                    if (to := moved(target)) != (from_ := moved(source)):
                        self.steps.append(Copy(to, from_))
                case Reduce(target, left, right):
                    self.steps.append(Reduce(moved(target), moved(left), moved(right)))

    def schedule(self) -> Schedule:
        return Schedule(tuple(self.steps), self.scratch)


def _on(p: Problem, ranks: Sequence[int], **more: object) -> Problem:
    """The problem of some of the ranks, this one among them."""
    fields = {"root": 0, "sends": (), "in_place": False, "hosts": (), **more}
    return replace(p, rank=ranks.index(p.rank), size=len(ranks), **fields)  # type: ignore[arg-type]


def all_reduce(p: Problem) -> Schedule:
    """A reduce-scatter on each host, an all-reduce of each lane, an all-gather on each host."""
    world, phases = _World(p), _Phases()
    nbytes = sum(p.receives)
    parts = even(nbytes, p.item, world.lanes)
    own = blocks(OUT, parts)[world.place] if world.lane else Span(OUT, 0, 0)
    here = (*parts, *(0 for _ in world.mine[world.lanes :]))  # bytes of each rank of this host
    source: Places = {IN: (p.source, 0), OUT: (OUT, own.start)}
    if len(world.mine) > 1:
        phases.add(direct.reduce_scatter(_on(p, world.mine, receives=here)), world.mine, source)
    elif not p.in_place and nbytes:
        phases.steps.append(Copy(Span(OUT, 0, nbytes), Span(IN, 0, nbytes)))
    if world.lane:
        shares = even(own.nbytes, p.item, len(world.lane))
        lane = _on(p, world.lane, receives=shares, in_place=True)
        phases.add(direct.all_reduce(lane), world.lane, {OUT: (OUT, own.start)})
    phases.add(
        direct.all_gather(_on(p, world.mine, receives=here, in_place=True)), world.mine, {OUT: (OUT, 0)}
    )
    return phases.schedule()


def reduce(p: Problem) -> Schedule:
    """On each host to one rank, there the root itself, and from these up a tree to the root."""
    world, phases = _World(p), _Phases()
    nbytes = p.receives[0]
    leaders = [p.root if p.root in host else host[0] for host in world.hosts]
    leader = next(one for one in leaders if one in world.mine)
    kept: tuple[Name, int] = (OUT, 0)
    if p.rank == leader != p.root:
        kept = (TMP, phases.reserve(nbytes))
    own_place = p.in_place and p.rank == p.root  # its part lies where the sum goes
    local = _on(p, world.mine, root=world.mine.index(leader), receives=(nbytes,), in_place=own_place)
    phases.add(direct.reduce(local), world.mine, {IN: (p.source, 0), OUT: kept})
    if p.rank == leader:
        among = _on(p, leaders, root=leaders.index(p.root), receives=(nbytes,), in_place=True)
        phases.add(pipelined.reduce(among), leaders, {OUT: kept})
    return phases.schedule()


def broadcast(p: Problem) -> Schedule:
    """From the root down a tree of one rank per host, and from these to their hosts, chunk by chunk."""
    world, phases = _World(p), _Phases()
    nbytes = p.receives[0]
    leaders = [p.root if p.root in host else host[0] for host in world.hosts]
    leader = next(one for one in leaders if one in world.mine)
    if p.rank == leader:
        among = _on(p, leaders, root=leaders.index(p.root), receives=(nbytes,))
        phases.add(pipelined.broadcast(among), leaders, {OUT: (OUT, 0)})
    for a, b in pieces(nbytes, p.chunk):
        if p.rank == leader:
            phases.steps += [Send(rank, Span(OUT, a, b)) for rank in world.mine if rank != leader]
        else:
            phases.steps.append(Recv(leader, Span(OUT, a, b)))
    return phases.schedule()


def all_gather(p: Problem) -> Schedule:
    """Blocks within each host; then lanes bring other hosts' blocks, and pass them on within the host."""
    world = _World(p)
    out = blocks(OUT, p.receives)
    steps: list[Step] = []
    if not p.in_place and out[p.rank].nbytes:
        steps.append(Copy(out[p.rank], Span(IN, 0, out[p.rank].nbytes)))

    def send(rank: int, block: int) -> None:
        steps.extend(Send(rank, out[block].part(a, b)) for a, b in pieces(out[block].nbytes, p.chunk))

    def receive(rank: int, block: int) -> None:
        steps.extend(Recv(rank, out[block].part(a, b)) for a, b in pieces(out[block].nbytes, p.chunk))

    others = [rank for rank in world.mine if rank != p.rank]
    for rank in others:
        send(rank, p.rank)
        receive(rank, rank)
    far = [host for host in world.hosts if p.rank not in host]
    for host in far if world.lane else ():
        for block in world.mine:
            if world.carrier(block, world.mine) == p.rank:
                send(host[world.place], block)
        for block in host:
            if world.carrier(block, world.mine) == p.rank:
                receive(host[world.place], block)
    for host in far:
        for block in host:
            carrier = world.carrier(block, world.mine)
            if carrier != p.rank:
                receive(carrier, block)
                continue
            for rank in others:
                send(rank, block)
    return Schedule(tuple(steps))


def reduce_scatter(p: Problem) -> Schedule:
    """Each block on each host to its carrier, from the carriers to that of its owner, and to the owner."""
    world, phases = _World(p), _Phases()
    for owner, block in enumerate(blocks(p.source, p.receives)):
        if not block.nbytes:
            continue
        home = next(host for host in world.hosts if owner in host)
        carrier, last = world.carrier(owner, world.mine), world.carrier(owner, home)
        kept: tuple[Name, int] = (OUT, 0) if p.rank == owner == carrier else (TMP, 0)
        if p.rank == carrier and kept[0] == TMP:
            kept = (TMP, phases.reserve(block.nbytes))
        local = _on(p, world.mine, root=world.mine.index(carrier), receives=(block.nbytes,))
        phases.add(direct.reduce(local), world.mine, {IN: (block.buffer, block.start), OUT: kept})
        if p.rank == carrier:
            lane = [world.carrier(owner, host) for host in world.hosts]
            among = _on(p, lane, root=lane.index(last), receives=(block.nbytes,), in_place=True)
            phases.add(direct.reduce(among), lane, {OUT: kept})
        if owner != last:
            if p.rank == last:
                phases.steps.append(Send(owner, Span(kept[0], kept[1], kept[1] + block.nbytes)))
            elif p.rank == owner:
                phases.steps.append(Recv(last, Span(OUT, 0, block.nbytes)))
    return phases.schedule()

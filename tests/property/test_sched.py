"""Scheduler: a model of its queues and windows, then its promises on shares, one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aiocomm_native import _core

Scheduler = _core.pure.Scheduler

SMALL = {"min_chunk": 64, "max_chunk": 1024, "min_window": 128, "max_window": 2048, "initial_rate": 0.005}
FLOWS = 6


def fields(chunk: Any) -> tuple[int, ...] | None:
    if chunk is None:
        return None
    return (chunk.item, chunk.offset, chunk.nbytes, chunk.last, chunk.header, chunk.cls, chunk.flow)


class ModelFlow:
    """What is queued, as [item, offset, nbytes] in order; `born`: the serial when it came."""

    def __init__(self, cls: int, born: int) -> None:
        self.cls = cls
        self.born = born
        self.ready = True
        self.greatest = 2**32
        self.headers: list[list[int]] = []
        self.data: list[list[int]] = []

    def queue(self) -> list[list[int]]:
        return self.headers or self.data

    def backlog(self) -> int:
        return sum(nbytes - offset for _, offset, nbytes in self.headers + self.data)


class SchedMachine(RuleBasedStateMachine):
    """Bytes are conserved, order holds within a flow, the window is kept; flow f is of group f // 2."""

    def __init__(self) -> None:
        super().__init__()
        self.flows: dict[int, ModelFlow] = {}
        self.declared: set[int] = set()
        self.flying: list[Any] = []
        self.items = self.serial = 0
        self.pushed = self.completed = self.cancelled = 0

    @initialize(
        share=st.sampled_from([0.0, 0.05, 0.3]), classes=st.tuples(*[st.integers(0, 3)] * (FLOWS // 2))
    )
    def begin(self, share: float, classes: tuple[int, ...]) -> None:
        self.share = share
        self.classes = classes
        self.sched = Scheduler(min_share=share, **SMALL)
        for flow in range(FLOWS):
            self.add_flow(flow, 1.0)

    @rule(flow=st.integers(0, FLOWS - 1), weight=st.floats(0.1, 10))
    def add_flow(self, flow: int, weight: float) -> None:
        cls = self.classes[flow // 2]
        if flow in self.flows:
            with pytest.raises(ValueError, match="exists"):
                self.sched.add_flow(flow, cls, weight, flow // 2)
        else:
            self.sched.add_flow(flow, cls, weight, flow // 2)
            self.flows[flow] = ModelFlow(cls, self.serial)

    @rule(flow=st.integers(0, FLOWS - 1))
    def remove_flow(self, flow: int) -> None:
        if flow in self.flows:
            gone = self.flows.pop(flow)
            assert self.sched.remove_flow(flow) == [i[0] for i in gone.headers + gone.data]
            self.cancelled += gone.backlog()
        else:
            with pytest.raises(ValueError, match="no such flow"):
                self.sched.remove_flow(flow)

    @rule(flow=st.integers(0, FLOWS - 1), weight=st.floats(0.1, 10))
    def set_weight(self, flow: int, weight: float) -> None:
        if flow in self.flows:
            self.sched.set_weight(flow // 2, weight)

    @rule(
        flow=st.integers(0, FLOWS - 1), sizes=st.lists(st.integers(0, 3000), max_size=3), header=st.booleans()
    )
    def push(self, flow: int, sizes: list[int], header: bool) -> None:
        for nbytes in sizes:
            self.items += 1
            if flow not in self.flows or (header and nbytes > SMALL["max_chunk"]):
                with pytest.raises(ValueError, match=r"no such flow|header"):
                    self.sched.push(flow, self.items, nbytes, header)
                continue
            self.sched.push(flow, self.items, nbytes, header)
            model = self.flows[flow]
            (model.headers if header else model.data).append([self.items, 0, nbytes])
            self.pushed += nbytes
            with pytest.raises(ValueError, match="queued already"):
                self.sched.push(flow, self.items, nbytes, header)

    @rule(flow=st.integers(0, FLOWS - 1), ready=st.booleans())
    def set_ready(self, flow: int, ready: bool) -> None:
        if flow in self.flows:
            self.sched.set_ready(flow, ready)
            self.flows[flow].ready = ready

    @rule(flow=st.integers(0, FLOWS - 1), nbytes=st.integers(0, SMALL["max_chunk"]))
    def set_chunk(self, flow: int, nbytes: int) -> None:
        if flow in self.flows and nbytes:
            self.sched.set_chunk(flow, nbytes)
            self.flows[flow].greatest = nbytes
        else:
            with pytest.raises(ValueError, match=r"no such flow|a byte at least"):
                self.sched.set_chunk(flow, nbytes)

    @rule(cls=st.integers(0, 3), declared=st.booleans())
    def declare(self, cls: int, declared: bool) -> None:
        self.sched.declare(cls, declared)
        (self.declared.add if declared else self.declared.discard)(cls)
        lowest = min((f.cls for f in self.flows.values()), default=4)
        assert self.sched.has_urgent == bool(self.bounding(lowest))
        groups = {(f.cls, flow // 2) for flow, f in self.flows.items() if f.ready and f.queue()}
        assert self.sched.has_rivals == any(
            one != other and one[0] == other[0] for one in groups for other in groups
        )

    def bounding(self, cls: int) -> set[int]:
        return {u for u in self.declared | {f.cls for f in self.flows.values()} if u > cls}

    def below(self, cls: int) -> int:
        return sum(c.nbytes for c in self.flying if c.cls < cls)

    def admits(self, cls: int, nbytes: int) -> bool:
        if all(c.cls < cls for c in self.flying if c.nbytes):
            return True
        for urgent in self.bounding(cls):
            if self.below(urgent) + nbytes > self.sched.window(urgent - 1):
                return False
        return self.below(4) + nbytes <= SMALL["max_window"]

    def front(self, flow: ModelFlow) -> int:
        _, offset, nbytes = flow.queue()[0]
        if flow.headers:
            return nbytes
        return min(nbytes - offset, self.sched.chunk_size(flow.cls), flow.greatest)

    @rule(times=st.integers(1, 5))
    def next(self, times: int) -> None:
        for _ in range(times):
            backlogged = [f for f in self.flows.values() if f.ready and f.queue()]
            assert self.sched.runnable == bool(backlogged)
            chunk = self.sched.next()
            if chunk is None:
                assert not backlogged or not all(self.admits(f.cls, self.front(f)) for f in backlogged)
                return
            flow = self.flows[chunk.flow]
            assert flow in backlogged
            assert chunk.cls == flow.cls
            top = max(f.cls for f in backlogged)
            assert flow.cls == top or (self.share > 0 and flow.cls < top)
            assert self.admits(flow.cls, chunk.nbytes)
            item = flow.queue()[0]
            assert (chunk.item, chunk.offset, chunk.nbytes) == (item[0], item[1], self.front(flow))
            assert chunk.header == bool(flow.headers)
            assert chunk.last == (chunk.offset + chunk.nbytes == item[2])
            item[1] += chunk.nbytes
            if chunk.last:
                flow.queue().pop(0)
            self.flying.append(chunk)
            self.serial = chunk.serial + 1

    @rule(times=st.integers(1, 5))
    def next_undone(self, times: int) -> None:
        """A chunk that is given back comes again, to the last field."""
        chunks = [c for c in (self.sched.next() for _ in range(times)) if c is not None]
        for chunk in reversed(chunks):
            self.sched.unget(chunk)
        again = [c for c in (self.sched.next() for _ in range(times)) if c is not None]
        assert [fields(c) for c in again] == [fields(c) for c in chunks]
        for chunk in reversed(again):
            self.sched.unget(chunk)
            self.serial = max(self.serial, chunk.serial + 1)

    @rule(data=st.data())
    def unget_any(self, data: st.DataObject) -> None:
        """Out of order, too: an older chunk returns before all that was queued behind it."""
        if not self.flying:
            return
        chunk = data.draw(st.sampled_from(self.flying))
        flow = self.flows.get(chunk.flow)
        queue = [] if flow is None else flow.headers if chunk.header else flow.data
        item = next((i for i in queue if i[0] == chunk.item), None)
        if (
            flow is None
            or chunk.serial < flow.born
            or (item is not None) == chunk.last
            or (item is not None and item[1] != chunk.offset + chunk.nbytes)
        ):
            with pytest.raises(ValueError, match=r"no such flow|removed|cancelled|newest"):
                self.sched.unget(chunk)
            return
        self.sched.unget(chunk)
        self.flying.remove(chunk)
        if item is not None:
            item[1] = chunk.offset
        else:
            queue.append([chunk.item, chunk.offset, chunk.offset + chunk.nbytes])
            queue.sort()  # items are numbered as they are pushed

    @rule(data=st.data(), elapsed_ns=st.integers(0, 10**6))
    def complete(self, data: st.DataObject, elapsed_ns: int) -> None:
        if self.flying:
            chunk = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
            self.sched.complete(chunk.nbytes, elapsed_ns, chunk.cls)
            self.completed += chunk.nbytes
        for cls in range(4):
            with pytest.raises(ValueError, match="in flight"):
                self.sched.complete(self.sched.in_flight(cls) + 1, 0, cls)

    @rule(item=st.integers(0, 200))
    def cancel(self, item: int) -> None:
        for flow in self.flows.values():
            for queue in (flow.headers, flow.data):
                for entry in queue:
                    if entry[0] == item:
                        remaining = entry[2] - entry[1]
                        assert self.sched.cancel(item) == remaining
                        queue.remove(entry)
                        self.cancelled += remaining
                        return
        assert self.sched.cancel(item) is None

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "sched"):
            return
        for number, flow in self.flows.items():
            assert self.sched.backlog(number) == flow.backlog()
        assert self.sched.items == sum(len(f.headers) + len(f.data) for f in self.flows.values())
        for cls in range(4):
            assert self.sched.in_flight(cls) == self.below(cls + 1) - self.below(cls)
            assert SMALL["min_window"] <= self.sched.window(cls) <= SMALL["max_window"]
            assert SMALL["min_chunk"] <= self.sched.chunk_size(cls) <= SMALL["max_chunk"]
        assert self.sched.in_flight() == self.below(4)

    def teardown(self) -> None:
        """Completions and readiness lead out of any state, and every byte is accounted for."""
        for flow in self.flows:
            self.set_ready(flow, True)
        while self.sched.items:
            self.next(1)
            while self.flying:
                chunk = self.flying.pop()
                self.sched.complete(chunk.nbytes, 0, chunk.cls)
                self.completed += chunk.nbytes
        self.completed += self.below(4)
        assert self.pushed == self.completed + self.cancelled


SchedMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestScheduler = SchedMachine.TestCase


fresh_items = itertools.count()


def keep_full(sched: Any, flows: dict[int, list[int]], nbytes: int, room: int = 0) -> dict[int, int]:
    """Serves about `nbytes` while every flow (message sizes in a cycle) stays backlogged; bytes by flow.

    With `room`, the transport is full after so many chunks: it refuses every flow, and then has room again.
    """
    taken = dict.fromkeys(flows, 0)
    pushed = dict.fromkeys(flows, 0)
    while sum(taken.values()) < nbytes:
        for flow, sizes in flows.items():
            while sched.backlog(flow) < 4096:
                sched.push(flow, next(fresh_items), sizes[pushed[flow] % len(sizes)])
                pushed[flow] += 1
        for _ in range(room or 1):
            chunk = sched.next()
            taken[chunk.flow] += chunk.nbytes
            sched.complete(chunk.nbytes, 0, chunk.cls)
        if room:
            while (refused := sched.next()) is not None:
                sched.unget(refused)
                sched.set_ready(refused.flow, False)
            for flow in flows:
                sched.set_ready(flow, True)
    return taken


message_sizes = st.lists(st.integers(1, 8192), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 200)


@settings(max_examples=25, deadline=None)
@given(
    groups=st.lists(st.tuples(st.floats(0.3, 5), st.integers(1, 3), message_sizes), min_size=2, max_size=4),
    before=st.integers(0, 50_000),
    room=st.integers(0, 3),
)
def test_weights_hold_by_bytes(groups: list[tuple[float, int, list[int]]], before: int, room: int) -> None:
    """Over any backlogged interval: whatever the sizes, a channel's peers, and a transport that is full."""
    sched = Scheduler(**SMALL)
    flows: dict[int, list[int]] = {}
    for group, (weight, peers, sizes) in enumerate(groups):
        for peer in range(peers):
            sched.add_flow(group * 8 + peer, 1, weight, group)
            flows[group * 8 + peer] = [sizes[(peer + i) % len(sizes)] for i in range(len(sizes))]
    keep_full(sched, flows, before, room)
    least = min(weight for weight, _, _ in groups) / sum(weight for weight, _, _ in groups)
    taken = keep_full(sched, flows, round(2 * 1024 / least / 0.05), room)
    total = sum(taken.values())
    for group, (weight, peers, _) in enumerate(groups):
        of_peers = [taken[group * 8 + peer] for peer in range(peers)]
        expected = total * weight / sum(weight for weight, _, _ in groups)
        assert sum(of_peers) == pytest.approx(expected, rel=0.05)
        assert max(of_peers) - min(of_peers) <= 2 * SMALL["max_chunk"]


@settings(max_examples=25, deadline=None)
@given(
    share=st.sampled_from([0.02, 0.05, 0.3, 0.5]),
    classes=st.sets(st.integers(0, 3), min_size=2).map(sorted),
    sizes=st.lists(message_sizes, min_size=4, max_size=4),
)
def test_lower_classes_get_their_share_and_no_more(
    share: float, classes: list[int], sizes: list[list[int]]
) -> None:
    sched = Scheduler(min_share=share, **SMALL)
    for cls in classes:
        sched.add_flow(cls, cls, 1.0, cls)
    taken = keep_full(sched, {cls: sizes[cls] for cls in classes}, 60_000)
    for top in range(1, len(classes)):
        lower = sum(taken[cls] for cls in classes[:top])
        both = lower + taken[classes[top]]
        assert share * both - 1024 <= lower <= share * both + 1


def test_strict_priority_without_a_share() -> None:
    sched = Scheduler(min_share=0.0, **SMALL)
    for cls in range(4):
        sched.add_flow(cls, cls, 1.0, cls)
        for message in range(5):
            sched.push(cls, cls * 10 + message, 700)
    order = []
    while (chunk := sched.next()) is not None:
        order.append(chunk.cls)
        sched.complete(chunk.nbytes, 0, chunk.cls)
    assert order == sorted(order, reverse=True)
    assert not sched.runnable


def test_share_is_not_hoarded_while_idle() -> None:
    """A lower flow that comes after a long urgent flood finds no credit saved up."""
    sched = Scheduler(min_share=0.05, **SMALL)
    sched.add_flow(3, 3, 1.0, 3)
    sched.add_flow(0, 0, 1.0, 0)
    keep_full(sched, {3: [512]}, 100_000)
    sched.push(0, 1, 64)
    before = sched.served(3)
    for item in range(2, 100):
        sched.push(3, item, 64)
        chunk = sched.next()
        sched.complete(chunk.nbytes, 0, chunk.cls)
        if chunk.flow == 0:
            break
    assert sched.served(3) - before >= 64 * 18


def test_lower_bytes_that_stay_posted_hold_up_nobody_above() -> None:
    """What lower classes are owed waits while their window is full, and is not saved up meanwhile."""
    sched = Scheduler(min_share=0.3, **SMALL)
    for cls in (0, 3):
        sched.add_flow(cls, cls, 1.0, cls)
        sched.push(cls, cls, 1 << 20)
    stuck = []
    for _ in range(400):
        chunk = sched.next()
        assert chunk is not None
        if chunk.cls:
            sched.complete(chunk.nbytes, 0, chunk.cls)
        else:
            stuck.append(chunk)
    assert sum(chunk.nbytes for chunk in stuck) == sched.in_flight(0) <= sched.window(0)
    for chunk in stuck:
        sched.complete(chunk.nbytes, 0, 0)
    classes = []
    for _ in range(20):
        chunk = sched.next()
        classes.append(chunk.cls)
        sched.complete(chunk.nbytes, 0, chunk.cls)
    assert 3 in classes[:8]


def test_small_urgent_chunks_leave_a_gap_for_a_lower_one() -> None:
    """Where the link is full, the gap that a small one leaves is kept until a larger, which is owed, fits."""
    sched = Scheduler(min_share=0.3, **SMALL)
    for cls in (0, 3):
        sched.add_flow(cls, cls, 1.0, cls)
    flying: list[Any] = []
    for turn in range(200):
        while sched.backlog(3) < 4096:
            sched.push(3, next(fresh_items), 64)
        while (chunk := sched.next()) is not None:
            flying.append(chunk)
        if turn == 0:
            assert sched.in_flight() == SMALL["max_window"]
            sched.push(0, next(fresh_items), 1 << 20)
        oldest = flying.pop(0)
        sched.complete(oldest.nbytes, 0, oldest.cls)
    assert any(chunk.cls == 0 for chunk in flying)


def test_a_group_is_over_with_its_last_flow() -> None:
    sched = Scheduler(**SMALL)
    sched.add_flow(0, 1, 1.0, 5)
    sched.add_flow(1, 1, 1.0, 5)
    sched.remove_flow(0)
    with pytest.raises(ValueError, match="another class"):
        sched.add_flow(0, 3, 1.0, 5)
    sched.remove_flow(1)
    sched.add_flow(0, 3, 1.0, 5)


@settings(max_examples=40, deadline=None)
@given(
    flows=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 3000), max_size=6)), min_size=2, max_size=5
    ),
    undone=st.lists(st.integers(0, 16), min_size=1, max_size=8),
    toggles=st.lists(st.integers(0, 40), max_size=4),
)
def test_unget_leaves_no_trace(
    flows: list[tuple[int, list[int]]], undone: list[int], toggles: list[int]
) -> None:
    """Two runs of one program, one of which takes and gives back chunks before every step, are the same."""

    def run(undone: list[int]) -> list[tuple[int, ...]]:
        sched = Scheduler(min_share=0.3, **SMALL)
        for flow, (cls, _) in enumerate(flows):
            sched.add_flow(flow, cls, 1.0 + flow, flow // 2 * 4 + cls)
        out = []
        for step in range(60):
            for flow, (_, sizes) in enumerate(flows):
                if step % 7 == flow % 3 and step < 30:
                    for number, nbytes in enumerate(sizes):
                        sched.push(
                            flow, flow << 32 | step << 8 | number, nbytes, number % 3 == 0 and nbytes <= 1024
                        )
            if step in toggles:
                sched.set_ready(step % len(flows), False)
            taken = [c for c in (sched.next() for _ in range(undone[step % len(undone)])) if c is not None]
            for chunk in reversed(taken):
                sched.unget(chunk)
            chunk = sched.next()
            if chunk is not None:
                out.append(fields(chunk))
                if step % 3:
                    sched.complete(chunk.nbytes, 100, chunk.cls)
        out.append(tuple(sched.served(flow // 2 * 4 + cls) for flow, (cls, _) in enumerate(flows)))
        return out

    assert run(undone) == run([0])


def test_window_follows_the_measured_rate_where_urgent_flows_exist() -> None:
    sched = Scheduler()
    sched.add_flow(0, 1, 1.0, 0)
    assert (sched.chunk_size(1), sched.window(1)) == (4 << 20, 8 << 20)
    sched.add_flow(1, 3, 1.0, 1)  # idle, yet it must find a short queue when it comes
    assert sched.window(1) == 800_000
    assert sched.chunk_size(1) == 400_000
    assert (sched.chunk_size(3), sched.window(3)) == (4 << 20, 8 << 20)
    sched.push(0, 1, 1 << 30)
    posted = [sched.next(), sched.next()]
    assert [c.nbytes for c in posted] == [400_000, 400_000]
    assert sched.next() is None
    for _ in range(30):
        done = posted.pop(0)
        sched.complete(done.nbytes, done.nbytes // 40, 1)
        posted += iter(sched.next, None)
    assert sched.rate == pytest.approx(40, rel=0.01)
    assert sched.window(1) == pytest.approx(40 * 100_000, rel=0.01)
    sched.set_preempt(3, 10_000)
    assert sched.window(1) == pytest.approx(400_000, rel=0.01)
    assert sched.chunk_size(1) == sched.window(1) // 2
    sched.set_preempt(3, 0)
    assert (sched.chunk_size(1), sched.window(1)) == (128 << 10, 256 << 10)
    sched.remove_flow(1)
    assert (sched.chunk_size(1), sched.window(1)) == (4 << 20, 8 << 20)


def test_a_class_bounds_others_while_it_is_declared() -> None:
    sched = Scheduler()
    sched.add_flow(0, 1, 1.0, 0)
    wide = sched.chunk_size(1), sched.window(1)
    sched.declare(2, True)
    assert (sched.chunk_size(1), sched.window(1)) == (400_000, 800_000)
    assert (sched.chunk_size(2), sched.window(2)) == wide
    sched.declare(2, False)
    assert (sched.chunk_size(1), sched.window(1)) == wide
    with pytest.raises(ValueError, match="classes"):
        sched.declare(4, True)


def test_urgent_chunk_is_posted_over_a_full_window() -> None:
    sched = Scheduler()
    sched.add_flow(0, 1, 1.0, 0)
    sched.push(0, 1, 1 << 30)
    while sched.next() is not None:
        pass
    assert sched.in_flight() == 8 << 20
    sched.add_flow(1, 3, 1.0, 1)
    sched.push(1, 2, 64)
    sched.push(1, 3, 1 << 20)
    assert sched.next().item == 2
    assert sched.next() is None
    sched.complete(4 << 20, 10**6, 1)
    assert sched.next().item == 3


def test_chunk_larger_than_the_window_still_goes() -> None:
    sched = Scheduler(min_chunk=1024, max_chunk=1024, min_window=1, max_window=1024, initial_rate=1e-9)
    sched.add_flow(0, 0, 1.0, 0)
    sched.add_flow(1, 3, 1.0, 1)
    sched.push(0, 1, 3000)
    for nbytes in (1024, 1024, 952):
        assert sched.next().nbytes == nbytes
        assert sched.next() is None
        sched.complete(nbytes, 0, 0)


def test_empty_items_take_turns() -> None:
    sched = Scheduler()
    for flow in (0, 1):
        sched.add_flow(flow, 1, 1.0, flow)
        for number in range(4):
            sched.push(flow, flow * 10 + number, 0)
    assert [sched.next().item for _ in range(8)] == [0, 10, 1, 11, 2, 12, 3, 13]


def test_small_samples_do_not_move_the_rate() -> None:
    sched = Scheduler()
    sched.add_flow(0, 1, 1.0, 0)
    sched.push(0, 1, 64)
    sched.complete(sched.next().nbytes, 10**6, 1)
    assert sched.rate == 8.0


@pytest.mark.parametrize(
    "bad",
    [
        {"min_chunk": 0},
        {"min_chunk": 8 << 20},
        {"max_chunk": 16 << 20},
        {"min_window": 16 << 20},
        {"initial_rate": 0.0},
        {"initial_rate": float("nan")},
        {"min_share": 0.6},
        {"min_share": float("nan")},
    ],
)
def test_illegal_configuration(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Scheduler(**bad)


def test_illegal_flows() -> None:
    sched = Scheduler()
    sched.add_flow(0, 1, 1.0, 7)
    for cls, weight, group in ((4, 1.0, 0), (2, 1.0, 7), (1, 0.0, 0), (1, float("nan"), 0), (1, 2000.0, 0)):
        with pytest.raises(ValueError, match=r"class|weight"):
            sched.add_flow(1, cls, weight, group)
    with pytest.raises(ValueError, match="no such group"):
        sched.served(0)
    with pytest.raises(ValueError, match="no such flow"):
        sched.set_ready(1, True)

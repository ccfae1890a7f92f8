"""TimerHeap against a dictionary."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aiocomm_native import _core

TimerHeap = _core.pure.TimerHeap

ids = st.integers(0, 20)


class TimerMachine(RuleBasedStateMachine):
    """The model keeps id -> deadline in the order of adding; a stable sort gives the order of expiry."""

    def __init__(self) -> None:
        super().__init__()
        self.heap = TimerHeap()
        self.pending: dict[int, int] = {}

    @rule(timer=ids, at_ns=st.integers(0, 50) | st.integers(0, 2**64 - 1))
    def add(self, timer: int, at_ns: int) -> None:
        if timer in self.pending:
            with pytest.raises(ValueError, match="pending"):
                self.heap.add(timer, at_ns)
        else:
            self.heap.add(timer, at_ns)
            self.pending[timer] = at_ns

    @rule(timer=ids)
    def cancel(self, timer: int) -> None:
        assert self.heap.cancel(timer) == (self.pending.pop(timer, None) is not None)

    @rule(timer=ids, at_ns=st.integers(0, 50), times=st.integers(1, 100))
    def rearm(self, timer: int, at_ns: int, times: int) -> None:
        """What an operation with a deadline does all the time."""
        self.cancel(timer)
        for _ in range(times):
            self.heap.add(timer, 10**9)
            assert self.heap.cancel(timer)
        self.add(timer, at_ns)

    @rule(now_ns=st.integers(0, 60))
    def expire(self, now_ns: int) -> None:
        due = [t for t, at_ns in self.pending.items() if at_ns <= now_ns]
        due.sort(key=lambda t: self.pending[t])
        assert self.heap.expire(now_ns) == due
        for timer in due:
            del self.pending[timer]

    @invariant()
    def agrees(self) -> None:
        assert len(self.heap) == len(self.pending)
        assert self.heap.next() == min(self.pending.values(), default=None)
        assert self.heap.capacity <= 2 * len(self.pending) + 128


TimerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestTimerHeap = TimerMachine.TestCase


def test_cancelled_far_deadlines_do_not_grow_memory() -> None:
    heap = TimerHeap()
    heap.add(0, 10**18)
    for timer in range(1, 200_000):
        heap.add(timer, 10**15 + timer)
        assert heap.cancel(timer)
        assert heap.capacity < 200
    assert heap.expire(10**18) == [0]
    assert heap.next() is None

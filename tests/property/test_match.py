"""Matcher against a model that scans lists."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aiocomm_native import _core

Matcher = _core.pure.Matcher

ANY_SOURCE = ANY_TAG = -1

channels = st.integers(0, 2)
ranks = st.integers(0, 2)
tags = st.sampled_from([0, 1, -2, 2**40])
wild_ranks = st.one_of(ranks, ranks, st.just(ANY_SOURCE))
wild_tags = st.one_of(tags, tags, st.just(ANY_TAG))


def fits(recv: tuple[int, int, int, int], arrival: tuple[int, int, int, int, int]) -> bool:
    _, channel, src, tag = recv
    return channel == arrival[1] and src in (ANY_SOURCE, arrival[2]) and tag in (ANY_TAG, arrival[3])


class MatchMachine(RuleBasedStateMachine):
    """Receives and arrivals are lists in queueing order: what fits first, matches."""

    def __init__(self) -> None:
        super().__init__()
        self.matcher = Matcher()
        self.recvs: list[tuple[int, int, int, int]] = []
        self.arrivals: list[tuple[int, int, int, int, int]] = []
        self.ids = 0
        self.ended: list[int] = []

    def new_id(self) -> int:
        self.ids += 1
        return self.ids

    @initialize(unexpected=st.booleans())
    def begin(self, unexpected: bool) -> None:
        """Arrivals that are queued before the first wildcard are indexed afterwards."""
        if unexpected:
            for src in range(3):
                for tag in (0, 1, -2):
                    self.arrive(src % 2, src, tag, 3)

    @rule(channel=channels, src=wild_ranks, tag=wild_tags)
    def post(self, channel: int, src: int, tag: int) -> None:
        recv = (self.new_id(), channel, src, tag)
        expected = next((a for a in self.arrivals if fits(recv, a)), None)
        got = self.matcher.post_recv(*recv)
        if expected is None:
            assert got is None
            self.recvs.append(recv)
        else:
            assert got == expected[0]
            self.arrivals.remove(expected)
            self.ended.append(got)

    @rule(channel=channels, src=ranks, tag=tags, nbytes=st.integers(0, 100))
    def arrive(self, channel: int, src: int, tag: int, nbytes: int) -> None:
        arrival = (self.new_id(), channel, src, tag, nbytes)
        expected = next((r for r in self.recvs if fits(r, arrival)), None)
        got = self.matcher.arrive(*arrival)
        if expected is None:
            assert got is None
            self.arrivals.append(arrival)
        else:
            assert got == expected[0]
            self.recvs.remove(expected)
            self.ended.append(got)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.recvs:
            recv = data.draw(st.sampled_from(self.recvs))
            assert self.matcher.cancel_recv(recv[0])
            self.recvs.remove(recv)
            self.ended.append(recv[0])

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.arrivals:
            arrival = data.draw(st.sampled_from(self.arrivals))
            assert self.matcher.drop_arrival(arrival[0])
            self.arrivals.remove(arrival)
            self.ended.append(arrival[0])

    @rule(channel=channels, src=wild_ranks, tag=wild_tags)
    def peek(self, channel: int, src: int, tag: int) -> None:
        expected = next((a for a in self.arrivals if fits((0, channel, src, tag), a)), None)
        assert self.matcher.peek(channel, src, tag) == expected

    @rule(src=ranks, drop_arrivals=st.booleans())
    def remove_source(self, src: int, drop_arrivals: bool) -> None:
        recvs = [r for r in self.recvs if r[2] == src]
        arrivals = [a for a in self.arrivals if a[2] == src and drop_arrivals]
        self.check_purge(self.matcher.remove_source(src, drop_arrivals), recvs, arrivals)

    @rule(channel=channels)
    def remove_channel(self, channel: int) -> None:
        recvs = [r for r in self.recvs if r[1] == channel]
        arrivals = [a for a in self.arrivals if a[1] == channel]
        self.check_purge(self.matcher.remove_channel(channel), recvs, arrivals)

    @rule(channel=channels)
    def forget(self, channel: int) -> None:
        """It changes nothing that is seen."""
        self.matcher.forget(channel)

    def check_purge(self, purged: tuple[list[int], list[int]], recvs: list, arrivals: list) -> None:
        assert purged == ([r[0] for r in recvs], [a[0] for a in arrivals])
        self.recvs = [r for r in self.recvs if r not in recvs]
        self.arrivals = [a for a in self.arrivals if a not in arrivals]
        self.ended += purged[0] + purged[1]

    @rule(data=st.data())
    def illegal(self, data: st.DataObject) -> None:
        if self.recvs:
            with pytest.raises(ValueError, match="posted already"):
                self.matcher.post_recv(data.draw(st.sampled_from(self.recvs))[0], 0, 0, 0)
        if self.arrivals:
            with pytest.raises(ValueError, match="queued already"):
                self.matcher.arrive(data.draw(st.sampled_from(self.arrivals))[0], 0, 0, 0, 0)
        for src, tag in ((-2, 0), (ANY_SOURCE, 0), (0, ANY_TAG)):
            with pytest.raises(ValueError, match="not wildcards"):
                self.matcher.arrive(0, 0, src, tag, 0)
        with pytest.raises(ValueError, match="source"):
            self.matcher.post_recv(0, 0, -2, 0)
        for ended in self.ended[-3:]:
            assert not self.matcher.cancel_recv(ended)
            assert not self.matcher.drop_arrival(ended)

    @invariant()
    def agrees(self) -> None:
        assert self.matcher.posted == len(self.recvs)
        assert self.matcher.unexpected == len(self.arrivals)
        assert self.matcher.unexpected_bytes == sum(a[4] for a in self.arrivals)
        assert self.matcher.all_recvs() == [r[0] for r in self.recvs]
        assert self.matcher.any_source_recvs() == [r[0] for r in self.recvs if r[2] == ANY_SOURCE]

    def teardown(self) -> None:
        """Nothing is lost: wildcards drain every channel in arrival order."""
        for recv in list(self.recvs):
            assert self.matcher.cancel_recv(recv[0])
        for channel in range(3):
            for arrival in [a for a in self.arrivals if a[1] == channel]:
                assert self.matcher.post_recv(self.new_id(), channel, ANY_SOURCE, ANY_TAG) == arrival[0]
        assert self.matcher.posted == self.matcher.unexpected == 0


MatchMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestMatcher = MatchMachine.TestCase


def test_forgotten_channels_do_not_grow_memory() -> None:
    matcher = Matcher()
    matcher.arrive(0, 0, 0, 0, 0)  # nobody takes it: wildcards are met where something waits
    for channel in range(1, 10_000):
        assert matcher.post_recv(2 * channel, channel, ANY_SOURCE, ANY_TAG) is None
        assert matcher.arrive(2 * channel + 1, channel, 1, 1, 8) == 2 * channel
        matcher.forget(channel)
        assert matcher.capacity < 100


@pytest.mark.parametrize("unexpected_first", [False, True])
@pytest.mark.parametrize("wild", [False, True])
def test_distinct_tags_do_not_grow_memory(unexpected_first: bool, wild: bool) -> None:
    matcher = Matcher()
    for tag in range(50_000):
        src = ANY_SOURCE if wild else 3
        if unexpected_first:
            assert matcher.arrive(tag, 1, 3, tag, 0) is None
            assert matcher.post_recv(tag, 1, src, tag) == tag
        else:
            assert matcher.post_recv(tag, 1, src, tag) is None
            assert matcher.arrive(tag, 1, 3, tag, 0) == tag
    assert matcher.capacity < 100


def test_queues_of_many_keys_survive_growth_and_removal() -> None:
    """Keys that differ in one field only: the table grows, and shifts entries back as they leave."""
    matcher = Matcher()
    keys = [(channel, src, tag) for channel in range(20) for src in range(20) for tag in range(20)]
    for op, key in enumerate(keys):
        assert matcher.post_recv(op, *key) is None
    for op in range(0, len(keys), 2):
        assert matcher.cancel_recv(op)
    for op, key in reversed(list(enumerate(keys))):
        assert matcher.arrive(op, *key, 1) == (op if op % 2 else None)
    assert (matcher.posted, matcher.unexpected) == (0, len(keys) // 2)
    for op, key in enumerate(keys):
        assert matcher.post_recv(op, *key) == (None if op % 2 else op)

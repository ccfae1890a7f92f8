"""RowList: its bytes, cut anywhere, against a list of bytes."""

from __future__ import annotations

from typing import TypeAlias

from hypothesis import given
from hypothesis import strategies as st

from aiocomm_native import _core

cut_rows = _core.pure.cut_rows
rdma_requests = _core.pure.rdma_requests

Rows: TypeAlias = tuple[int, int, int, int, int, int]

rows = st.tuples(
    st.integers(1000, 2000),
    st.integers(1000, 2000),
    st.integers(-20, 40),
    st.integers(-20, 40),
    st.integers(1, 12),
    st.integers(1, 6),
)


def pairs(found: list[Rows]) -> list[tuple[int, int]]:
    """Source and target of each byte, in order."""
    return [
        (start + row * from_step + at, to + row * to_step + at)
        for start, to, from_step, to_step, nbytes, count in found
        for row in range(count)
        for at in range(nbytes)
    ]


@given(st.lists(rows, min_size=1, max_size=5), st.data())
def test_a_cut_has_the_bytes_that_it_asks_for(given_rows: list[Rows], data: st.DataObject) -> None:
    everything = pairs(given_rows)
    start = data.draw(st.integers(0, len(everything)))
    stop = data.draw(st.integers(start, len(everything)))
    found = cut_rows(given_rows, start, stop - start)
    assert pairs(found) == everything[start:stop]
    assert len(found) <= len(given_rows) + 2 * 2  # only at its ends are there parts of rows


@given(st.lists(rows, min_size=1, max_size=5), st.booleans(), st.data())
def test_requests_have_the_bytes_that_they_are_made_of(
    given_rows: list[Rows], read: bool, data: st.DataObject
) -> None:
    everything = pairs(given_rows)
    start = data.draw(st.integers(0, len(everything) - 1))
    stop = data.draw(st.integers(start + 1, len(everything)))
    most, most_pieces = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    found: list[tuple[int, int]] = []
    while start + len(found) < stop:
        rest = stop - start - len(found)
        requests, nbytes = rdma_requests(given_rows, read, start + len(found), rest, most, most_pieces)
        assert 0 < len(requests) <= most
        moved = []
        for remote, pieces in requests:
            assert 0 < len(pieces) <= most_pieces
            here = [at + i for at, length in pieces for i in range(length)]
            there = range(remote, remote + len(here))
            moved += list(zip(there, here, strict=True) if read else zip(here, there, strict=True))
        assert len(moved) == nbytes
        found += moved
    assert found == everything[start:stop]


def test_requests_are_as_few_as_can_be() -> None:
    """What is close together there is one request of several pieces; what is so on both sides one piece."""
    apart = [(0, 0, 100, 8, 8, 7)]
    assert rdma_requests(apart, False, 0, 56, 9, 4) == (
        [(0, [(0, 8), (100, 8), (200, 8), (300, 8)]), (32, [(400, 8), (500, 8), (600, 8)])],
        56,
    )
    assert rdma_requests(apart, False, 0, 56, 1, 4)[1] == 32  # the rest is for the next call
    assert rdma_requests([(0, 50, 8, 8, 8, 7)], True, 0, 56, 9, 4) == ([(0, [(50, 56)])], 56)
    assert len(rdma_requests([(0, 0, 8, 100, 8, 7)], False, 0, 56, 9, 4)[0]) == 7  # apart at the peer


def test_all_of_a_list_is_the_list() -> None:
    given_rows = [(0, 100, 10, 20, 5, 7), (1000, 7, 0, 0, 3, 1)]
    assert cut_rows(given_rows, 0, 38) == given_rows
    assert cut_rows(given_rows, 38, 0) == []

"""RowList: its bytes, cut anywhere, against a list of bytes."""

from __future__ import annotations

from typing import TypeAlias

from hypothesis import given
from hypothesis import strategies as st

from aiocomm_native import _core

cut_rows = _core.pure.cut_rows

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


def test_all_of_a_list_is_the_list() -> None:
    given_rows = [(0, 100, 10, 20, 5, 7), (1000, 7, 0, 0, 3, 1)]
    assert cut_rows(given_rows, 0, 38) == given_rows
    assert cut_rows(given_rows, 38, 0) == []

"""Whatever the degrees of two engines, each rank reads its heads once, and all know who reads whom."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiocomm.vllm.ranks import heads_of, readers, shares


def degrees(heads: int) -> list[int]:
    """Those that vLLM takes for so many KV heads."""
    return [n for n in range(1, 33) if heads % n == 0 or n % heads == 0]


@st.composite
def engines(draw: st.DrawFn) -> tuple[int, int, int]:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
    return heads, draw(st.sampled_from(degrees(heads))), draw(st.sampled_from(degrees(heads)))


@given(engines())
def test_each_head_is_read_once_and_is_the_same_head(drawn: tuple[int, int, int]) -> None:
    heads, ranks, others = drawn
    for rank in range(ranks):
        mine, filled = heads_of(rank, ranks, heads), []
        for share in shares(rank, ranks, others, heads):
            theirs = heads_of(share.rank, others, heads)
            assert 0 <= share.rank < others
            assert list(theirs[slice(*share.there)]) == list(mine[slice(*share.here)])
            filled += list(mine[slice(*share.here)])
        assert filled == list(mine)


@given(engines())
def test_an_owner_knows_its_readers(drawn: tuple[int, int, int]) -> None:
    heads, ranks, others = drawn
    for owner in range(others):
        said = {r for r in range(ranks) if any(s.rank == owner for s in shares(r, ranks, others, heads))}
        assert readers(owner, others, ranks, heads) == said


@given(engines())
def test_ranks_that_hold_the_same_share_the_work(drawn: tuple[int, int, int]) -> None:
    heads, ranks, others = drawn
    loads = [len(readers(owner, others, ranks, heads)) for owner in range(others)]
    if ranks >= others:  # nobody is left out, and nobody has more than its part
        assert min(loads) >= 1
        assert max(loads) <= -(-ranks // others) if others >= heads else max(loads) <= ranks

"""Membership as a pure state machine, with Hypothesis against its rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiocomm._control.membership import Became, Came, JoinRefusedError, Membership, Went
from aiocomm._control.messages import PeerCard
from aiocomm._world import MAX_RANKS
from aiocomm.errors import UsageError
from aiocomm_native import _core


def card(pid: int = 1, name: str | None = None, addresses: tuple[str, ...] = ()) -> PeerCard:
    return PeerCard(0, 0, name, "host", "id", pid, 1, 1, (), ("shm",), addresses)


def test_a_fixed_world_is_ready_with_its_last_rank() -> None:
    world = Membership(3, first_generation=10)
    one, told = world.admit(1, 3, card(11))
    assert (one.rank, one.generation, one.pid) == (1, 10, 11)
    assert told == [Came(one)]
    world.admit(0, 3, card())
    assert not world.ready
    assert world.missing() == [2]
    _, told = world.admit(2, 3, card())
    assert told[-1] == Became()
    assert world.ready
    assert [member.rank for member in world] == [0, 1, 2]


def test_a_taken_rank_is_refused_and_names_its_holder() -> None:
    world = Membership(2)
    world.admit(1, 2, card(pid=4711))
    with pytest.raises(JoinRefusedError, match="rank 1 is taken by process 4711 on host") as refused:
        world.admit(1, 2, card(pid=4712))
    assert not refused.value.retry
    assert [member.pid for member in world] == [4711]


def test_who_holds_the_rank_itself_may_ask_again() -> None:
    """Its connection broke, and there is no word of that yet."""
    world = Membership(2)
    held, _ = world.admit(1, 2, card(addresses=("unix://@one",)))
    for address, retry in (("unix://@one", True), ("unix://@two", False)):
        with pytest.raises(JoinRefusedError, match="rank 1 is taken by process 1 on host") as refused:
            world.admit(1, 2, card(addresses=(address,)))
        assert refused.value.retry == retry
    world.lose(1, held.generation, "died")
    again, _ = world.admit(1, 2, card(addresses=("unix://@one",)))
    assert again.generation > held.generation


@pytest.mark.parametrize(
    ("rank", "size", "complaint"),
    [
        (None, None, "fixed size of 2"),
        (1, None, "fixed size of 2"),
        (None, 2, "fixed size of 2"),
        (1, 3, "expects 3 processes, but this world has 2"),
        (2, 2, "not within a world of 2"),
    ],
)
def test_a_fixed_world_wants_rank_and_size(rank: int | None, size: int | None, complaint: str) -> None:
    world = Membership(2)
    with pytest.raises(JoinRefusedError, match=complaint):
        world.admit(rank, size, card())
    assert len(world) == 0


def test_a_restarted_rank_is_a_new_generation_of_a_ready_world() -> None:
    world = Membership(2)
    world.admit(0, 2, card())
    old, _ = world.admit(1, 2, card(5))
    assert world.lose(1, old.generation, "died") == [Went(old, False, "died")]
    assert world.ready
    new, told = world.admit(1, 2, card(6))
    assert new.generation == old.generation + 1
    assert told == [Came(new)]
    # Late news of the old one changes nothing.
    assert world.lose(1, old.generation, "died") == []
    assert world.leave(1, old.generation) == []
    assert [member.pid for member in world] == [1, 6]


def test_ranks_of_an_elastic_world_grow_and_never_come_back() -> None:
    world = Membership(None)
    assert world.ready
    first, told = world.admit(None, None, card(name="decode-0"))
    assert told == [Came(first)]
    second, _ = world.admit(None, None, card())
    world.leave(second.rank, second.generation)
    world.lose(first.rank, first.generation, "died")
    third, _ = world.admit(None, None, card())
    assert (first.rank, second.rank, third.rank) == (0, 1, 2)


def test_rank_zero_of_an_elastic_world_can_be_kept_for_its_host() -> None:
    world = Membership(None, reserve_zero=True)
    other, told = world.admit(None, None, card())
    assert told == [Came(other)]
    assert not world.ready
    host, told = world.admit(0, None, card())
    assert told == [Came(host), Became()]
    assert world.ready
    assert (other.rank, host.rank) == (1, 0)
    with pytest.raises(JoinRefusedError, match="deals out the ranks"):
        world.admit(0, None, card())
    world.lose(0, host.generation, "died")
    with pytest.raises(JoinRefusedError, match="deals out the ranks"):
        world.admit(0, None, card())


def test_an_elastic_world_deals_out_no_rank_that_engines_do_not_know() -> None:
    world = Membership(None)
    world._next_rank = MAX_RANKS - 1  # a million later
    last, _ = world.admit(None, None, card())
    with pytest.raises(
        JoinRefusedError, match="dealt out all of its 1048576 ranks: start a new one"
    ) as refused:
        world.admit(None, None, card())
    assert not refused.value.retry
    engine = _core.Engine([], {}, {})
    engine.add_peer(last.rank, last.generation)
    with pytest.raises(ValueError, match="out of range"):
        engine.add_peer(last.rank + 1, 1)
    engine.close()
    engine.release_descriptors()


@pytest.mark.parametrize(("rank", "size"), [(0, None), (5, None), (0, 4), (None, 4)])
def test_an_elastic_world_takes_no_wishes(rank: int | None, size: int | None) -> None:
    with pytest.raises(JoinRefusedError, match="elastic"):
        Membership(None).admit(rank, size, card())


def test_goodbye_is_told_as_such_and_once() -> None:
    world = Membership(None)
    member, _ = world.admit(None, None, card())
    assert world.leave(member.rank, member.generation) == [Went(member, True, "left")]
    assert world.lose(member.rank, member.generation, "hung up") == []


def test_an_overlong_name_is_refused() -> None:
    with pytest.raises(JoinRefusedError, match="too long"):
        Membership(None).admit(None, None, card(name="x" * 300))


def test_a_world_has_members() -> None:
    with pytest.raises(UsageError):
        Membership(0)


@given(
    st.none() | st.integers(1, 4),
    st.booleans(),
    st.lists(
        st.tuples(st.sampled_from(["admit", "leave", "lose"]), st.none() | st.integers(0, 5)), max_size=40
    ),
)
def test_any_history(size: int | None, reserve: bool, calls: list[tuple[str, int | None]]) -> None:
    world = Membership(size, 100, reserve_zero=reserve)
    present: dict[int, PeerCard] = {}
    seen: set[tuple[int, int]] = set()
    ready_told = 0
    for call, rank in calls:
        if call == "admit":
            try:
                admitted, told = world.admit(rank, size, card())
            except JoinRefusedError:
                continue
            assert admitted.rank not in present
            assert (admitted.rank, admitted.generation) not in seen
            assert all(generation < admitted.generation for at, generation in seen if at == admitted.rank)
            if size is None:
                assert admitted.rank not in {at for at, _ in seen}
            else:
                assert admitted.rank < size
            seen.add((admitted.rank, admitted.generation))
            present[admitted.rank] = admitted
            ready_told += told.count(Became())
        else:
            holder = present.get(rank if rank is not None else 0)
            if holder is None:
                continue
            out = world.leave if call == "leave" else lambda r, g: world.lose(r, g, "died")
            assert len(out(holder.rank, holder.generation)) == 1
            assert out(holder.rank, holder.generation) == []
            del present[holder.rank]
        assert {member.rank: member for member in world} == present
    assert ready_told <= 1
    assert world.ready == (ready_told == 1 or (size is None and not reserve))

"""Large worlds: the model of an RDMA process, its table in the documentation, and rank 0's descriptors."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aiocomm_bench import startup

from aiocomm._control import hosting, messages, wire
from aiocomm.errors import UsageError
from aiocomm.links import _rdma_scale as scale

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/pages/explanation/scale.md"
RAIL = ROOT / "aiocomm_native/links/rdma/rail.hpp"


def test_the_page_shows_what_the_model_computes() -> None:
    shown = re.search(r"<!-- scale -->\n(.*?)\n<!-- /scale -->", PAGE.read_text(), re.DOTALL)
    assert shown, "the table is missing"
    assert shown[1] == scale.table(), f"{sys.executable} -m aiocomm.links._rdma_scale prints the new one"


@pytest.mark.skipif(not RAIL.exists(), reason="this version has no rdma link to compare with")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kSlotBytes", scale.SLOT_NBYTES),
        ("kCredits", scale.CREDITS),
        ("kMaxSlots", scale.MAX_SLOTS),
        ("kImmediates", scale.IMMEDIATES),
        ("kFrameDepth", scale.FRAME_DEPTH),
        ("kBulkDepth", scale.BULK_DEPTH),
    ],
)
def test_the_model_has_the_link_s_figures(name: str, value: int) -> None:
    found = re.search(rf"\b{name} = ([\w* ]+)[,;]", RAIL.read_text())
    assert found, name
    assert eval(found[1], {"kCredits": scale.CREDITS}) == value


def test_a_card_is_as_large_as_the_model_says() -> None:
    card = wire.encode_card(startup.card(1023))
    assert abs(len(card) - scale.CARD_NBYTES) < 8
    told = wire.encode_joined(wire.encode_card(startup.card(rank)) for rank in range(1, 512))
    computed = scale.cost(512).told_nbytes
    assert sum(map(len, told)) + scale.TAG_NBYTES * len(told) == pytest.approx(computed, rel=0.03)
    assert len(wire.encode(messages.Joined(()))) == scale.HEADER_NBYTES
    assert scale.CARDS_PER_FRAME == wire.MAX_ITEMS


def test_a_process_costs_what_it_talks_to_not_what_there_is() -> None:
    few = scale.cost(10_000, 64)
    world = scale.cost(65)
    assert (few.queue_pairs, few.memory_nbytes, few.handshake_frames) == (
        world.queue_pairs,
        world.memory_nbytes,
        world.handshake_frames,
    )


def test_receive_memory_is_bounded_whatever_the_number_of_peers() -> None:
    assert scale.cost(129).receive_nbytes == scale.cost(10_000).receive_nbytes == 2 * 4096 * 8448
    assert scale.cost(65).receive_nbytes * 2 == scale.cost(129).receive_nbytes


@pytest.mark.parametrize(("world", "connected", "rails"), [(1, None, 2), (8, 8, 2), (8, 0, 2), (8, None, 0)])
def test_what_there_is_not_is_refused(world: int, connected: int | None, rails: int) -> None:
    with pytest.raises(ValueError, match="peers over"):
        scale.cost(world, connected, rails)


Limits = tuple[int, int]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[Limits]]:
    """Sets what the system says of the limit; returns the list of what is set instead."""

    def pretend(soft: int, hard: int) -> list[Limits]:
        changed: list[Limits] = []
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
        monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: changed.append(wanted))
        return changed

    return pretend


@pytest.mark.parametrize(
    ("members", "soft", "hard", "expected"),
    [
        (1024, 1024, 1 << 20, [(2176, 1 << 20)]),
        (1024, 1024, 1500, [(1500, 1500)]),
        (1024, 1024, resource.RLIM_INFINITY, [(2176, resource.RLIM_INFINITY)]),
        (1024, 4096, 4096, []),
        (1024, resource.RLIM_INFINITY, resource.RLIM_INFINITY, []),
        (64, 100, 100, []),
    ],
)
def test_rank_zero_raises_its_limit_of_open_files(
    limits: Callable[[int, int], list[Limits]], members: int, soft: int, hard: int, expected: list[Limits]
) -> None:
    changed = limits(soft, hard)
    hosting.allow_descriptors(members)
    assert changed == expected


def test_a_hard_limit_that_is_too_low_is_told(limits: Callable[[int, int], list[Limits]]) -> None:
    changed = limits(256, 1024)
    with pytest.raises(
        UsageError, match=r"rank 0 of 1024 processes needs 1152 open files, but may have 1024"
    ):
        hosting.allow_descriptors(1024)
    assert not changed

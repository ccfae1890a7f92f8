"""Collective schedules in the simulator: right bytes in any order, no deadlock, no more bytes than needed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiocomm.collectives.algorithms import ALGORITHMS, BETWEEN_HOSTS, applicable, build
from aiocomm.collectives.cost import choose
from aiocomm.collectives.dissemination import exchange
from aiocomm.collectives.simulator import Deadlock, Traffic, simulate
from aiocomm.collectives.steps import OUT, Problem, Recv, Schedule, Send, Span, dependencies
from aiocomm.errors import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

ROOTED = {"broadcast", "scatter", "gather", "reduce", "scatterv", "gatherv"}
EQUAL = {("all_to_all", "bruck")}
PAIRS = [(operation, name) for operation, names in ALGORITHMS.items() for name in names]


def add(a: Bytes, b: Bytes) -> Bytes:
    return a + b  # modulo 256: exact in any order


def problems(
    operation: str, size: int, root: int, sizes: list[int], chunk: int, item: int, in_place: bool
) -> list[Problem]:
    """The problem of each rank; `sizes` are the bytes of the blocks."""

    def problem(rank: int, sends: list[int], receives: list[int]) -> Problem:
        return Problem(rank, size, root, tuple(sends), tuple(receives), item, chunk, in_place)

    match operation.removesuffix("v"):
        case "broadcast" | "reduce":
            return [problem(r, [], sizes[:1]) for r in range(size)]
        case "scatter":
            if operation == "scatter":  # binomial: every rank knows all sizes; direct needs its own
                return [problem(r, sizes, [sizes[r]]) for r in range(size)]
            return [problem(r, sizes if r == root else [], [sizes[r]]) for r in range(size)]
        case "gather":
            return [
                problem(r, [sizes[r]], sizes if operation == "gather" or r == root else [])
                for r in range(size)
            ]
        case "all_to_all":
            matrix = [[sizes[(i * 3 + j) % size] for j in range(size)] for i in range(size)]
            return [problem(r, matrix[r], [matrix[i][r] for i in range(size)]) for r in range(size)]
        case _:
            return [problem(r, [], sizes) for r in range(size)]


def _sizes(operation: str, p: Problem) -> tuple[int, int]:
    """Bytes of `IN` and `OUT`."""
    whole = sum(p.receives)
    match operation:
        case "all_gather":
            return p.receives[p.rank], whole
        case "reduce_scatter":
            return whole, p.receives[p.rank]
        case "reduce" | "all_reduce":
            return whole, whole
        case _:
            return sum(p.sends), whole


def run(
    operation: str, algorithm: str, cases: list[Problem], choose: random.Random
) -> tuple[Traffic, list[Bytes], list[Bytes]]:
    """Simulate with random contents; returns the traffic, all inputs and all outputs."""
    rng = np.random.default_rng(choose.randrange(1 << 30))
    given, out = [], []
    for p in cases:
        n_in, n_out = _sizes(operation.removesuffix("v"), p)
        given.append(rng.integers(0, 256, n_in, np.uint8))
        out.append(rng.integers(0, 256, n_out, np.uint8))
    before = [o.copy() if p.in_place else g for p, g, o in zip(cases, given, out, strict=True)]
    if operation == "broadcast":
        before = [o.copy() for o in out]
    schedules = [build(operation, algorithm, p) for p in cases]
    traffic = simulate(schedules, given, out, add, choose.randrange)
    return traffic, before, out


def wanted(operation: str, p: Problem, before: list[Bytes], cases: list[Problem]) -> Bytes | None:
    """What `OUT` of a rank must hold; None: nothing is promised."""

    def cut(rank: int, sizes: tuple[int, ...], block: int) -> Bytes:
        start = sum(sizes[:block])
        return before[rank][start : start + sizes[block]]

    match operation.removesuffix("v"):
        case "broadcast":
            return before[p.root]
        case "reduce":
            return np.sum(before, axis=0, dtype=np.uint8) if p.rank == p.root else None
        case "scatter":
            return cut(p.root, cases[p.root].sends, p.rank)
        case "gather":
            if p.rank != p.root:
                return None
            parts = [
                cut(r, p.receives, r) if p.in_place and r == p.root else before[r] for r in range(p.size)
            ]
            return np.concatenate(parts)
        case "all_gather":
            own = [cut(r, p.receives, r) if p.in_place else before[r] for r in range(p.size)]
            return np.concatenate(own)
        case "all_to_all":
            return np.concatenate([cut(r, cases[r].sends, p.rank) for r in range(p.size)])
        case "reduce_scatter":
            total = np.sum(before, axis=0, dtype=np.uint8)
            start = sum(p.receives[: p.rank])
            return total[start : start + p.receives[p.rank]]
        case _:
            return np.sum(before, axis=0, dtype=np.uint8)


def check(operation: str, algorithm: str, cases: list[Problem], seed: int) -> Traffic:
    """Simulate and compare every rank's output."""
    traffic, before, out = run(operation, algorithm, cases, random.Random(seed))
    for p in cases:
        right = wanted(operation, p, before, cases)
        if right is not None:
            got = out[p.rank][: len(right)]
            assert np.array_equal(got, right), (operation, algorithm, p)
    return traffic


IN_PLACE = {"reduce", "all_reduce", "all_gather", "broadcast"}


@pytest.mark.parametrize(("operation", "algorithm"), PAIRS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_right_bytes_in_any_order(operation: str, algorithm: str, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 9))
    if algorithm not in applicable(operation, size):
        size = 8
    root = data.draw(st.integers(0, size - 1)) if operation in ROOTED else 0
    item = data.draw(st.sampled_from([1, 2, 8]))
    one = st.integers(0, 12)
    uneven = (operation, algorithm) not in EQUAL
    sizes = data.draw(
        st.lists(one, min_size=size, max_size=size) if uneven else one.map(lambda n: [n] * size)
    )
    chunk = item * data.draw(st.integers(1, 5))
    in_place = operation in IN_PLACE and data.draw(st.booleans())
    cases = problems(operation, size, root, [n * item for n in sizes], chunk, item, in_place)
    check(operation, algorithm, cases, data.draw(st.integers(0, 1 << 20)))


@pytest.mark.parametrize(("operation", "algorithm"), PAIRS)
@pytest.mark.parametrize("size", [16, 37, 64])
def test_large_groups(operation: str, algorithm: str, size: int) -> None:
    if algorithm not in applicable(operation, size):
        pytest.skip("powers of two only")
    check(operation, algorithm, problems(operation, size, size // 3, [4] * size, 4, 2, False), size)


# ---------------------------------------------------------------- several hosts


@pytest.mark.parametrize("operation", BETWEEN_HOSTS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_hosts_of_any_size_get_the_right_bytes_in_any_order(operation: str, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4).filter(lambda c: max(c) > 1))
    hosts = data.draw(st.permutations([host for host, n in enumerate(counts) for _ in range(n)]))
    size = len(hosts)
    root = data.draw(st.integers(0, size - 1)) if operation in ROOTED else 0
    item = data.draw(st.sampled_from([1, 2, 8]))
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))
    in_place = operation in IN_PLACE and data.draw(st.booleans())
    chunk = item * data.draw(st.integers(1, 5))
    cases = problems(operation, size, root, [n * item for n in sizes], chunk, item, in_place)
    cases = [replace(p, hosts=tuple(hosts)) for p in cases]
    check(operation, "hierarchical", cases, data.draw(st.integers(0, 1 << 20)))


@pytest.mark.parametrize("operation", BETWEEN_HOSTS)
@pytest.mark.parametrize("counts", [(8, 8), (8, 8, 8, 8), (1, 2, 5), (16, 16), (1,) * 9 + (4,)])
def test_what_a_host_needs_crosses_the_network_once(operation: str, counts: tuple[int, ...]) -> None:
    hosts = tuple(host for host, n in enumerate(counts) for _ in range(n))
    size, block = len(hosts), 64
    sizes = [block] * size if operation not in ROOTED else [block * size]
    cases = [replace(p, hosts=hosts) for p in problems(operation, size, 1, sizes, 16, 2, False)]
    schedules = [build(operation, "hierarchical", p) for p in cases]
    check(operation, "hierarchical", cases, size)
    into = [0] * len(counts)
    for p, schedule in zip(cases, schedules, strict=True):
        for step in schedule.steps:
            if isinstance(step, Recv) and hosts[step.peer] != hosts[p.rank]:
                into[hosts[p.rank]] += step.target.nbytes
    whole, home = block * size, hosts[1]
    match operation:
        case "broadcast":
            assert into == [0 if host == home else whole for host in range(len(counts))]
        case "all_gather":
            assert into == [whole - n * block for n in counts]
        case "reduce":
            assert sum(into) == whole * (len(counts) - 1)
        case "reduce_scatter":
            assert into == [n * block * (len(counts) - 1) for n in counts]
        case "all_reduce":
            assert sum(into) == 2 * whole * (len(counts) - 1)


def test_one_host_or_one_rank_per_host_has_nothing_to_gain() -> None:
    assert "hierarchical" not in applicable("all_reduce", 4, (0, 0, 0, 0))
    assert "hierarchical" not in applicable("all_reduce", 3, (0, 1, 2))
    assert "hierarchical" in applicable("all_reduce", 3, (0, 1, 0))
    assert "hierarchical" not in applicable("all_to_all", 3, (0, 1, 0))


@pytest.mark.parametrize(("operation", "nbytes"), [("all_gather", 64 << 20), ("all_reduce", 64 << 20)])
def test_the_cost_model_goes_by_host_where_adapters_are_shared(operation: str, nbytes: int) -> None:
    hosts = (0,) * 8 + (1,) * 8
    assert choose(operation, 16, nbytes, "tcp", hosts) == "hierarchical"
    assert choose(operation, 16, nbytes, "shm") != "hierarchical"
    assert choose(operation, 2, nbytes, "tcp", (0, 1)) != "hierarchical"


LEAST = {  # bytes that every rank receives at least, for blocks of one size b, in units of b
    "all_gather": lambda n: n - 1,
    "all_to_all": lambda n: n - 1,
    "reduce_scatter": lambda n: n - 1,
    "all_reduce": lambda n: 2 * (n - 1),
}


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 64])
@pytest.mark.parametrize(
    ("operation", "algorithm"),
    [
        *(("all_gather", a) for a in ALGORITHMS["all_gather"]),
        ("all_to_all", "direct"),
        ("reduce_scatter", "direct"),
        ("reduce_scatter", "ring"),
        ("all_reduce", "direct"),
        ("all_reduce", "ring"),
    ],
)
def test_bandwidth_algorithms_move_the_fewest_bytes(operation: str, algorithm: str, size: int) -> None:
    if algorithm not in applicable(operation, size):
        pytest.skip("powers of two only")
    block = 8
    traffic = check(operation, algorithm, problems(operation, size, 0, [block] * size, 8, 1, False), 1)
    for rank in range(size):
        assert traffic.received[rank] == block * LEAST[operation](size)
        assert traffic.sent[rank] == traffic.received[rank]


@pytest.mark.parametrize("size", [2, 3, 6, 17, 64])
@pytest.mark.parametrize("algorithm", ["direct", "binomial", "pipelined"])
@pytest.mark.parametrize("operation", ["broadcast", "reduce"])
def test_trees_move_every_byte_once_per_rank(operation: str, algorithm: str, size: int) -> None:
    traffic = check(operation, algorithm, problems(operation, size, 1, [24], 8, 1, False), 2)
    one_way = traffic.received if operation == "broadcast" else traffic.sent
    assert [one_way[r] for r in range(size)] == [0 if r == 1 else 24 for r in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 21, 64])
def test_dissemination_brings_every_slot(size: int) -> None:
    cases = [Problem(r, size, receives=(4,) * size) for r in range(size)]
    out = [np.zeros(4 * size, np.uint8) for _ in cases]
    for r in range(size):
        out[r][:4] = r
    empty = [np.empty(0, np.uint8)] * size
    traffic = simulate([exchange(p) for p in cases], empty, out, add, random.Random(0).randrange)
    for r in range(size):
        assert [int(out[r][4 * k]) for k in range(size)] == [(r - k) % size for k in range(size)]
    assert max(traffic.messages.values(), default=0) == (size - 1).bit_length()


def test_the_simulator_finds_a_deadlock() -> None:
    span = Span(OUT, 0, 4)

    def waits_first(peer: int) -> Schedule:
        return Schedule((Recv(peer, span), Send(peer, span)))

    with pytest.raises(Deadlock, match="receives"):
        simulate(
            [waits_first(1), waits_first(0)],
            [np.empty(0, np.uint8)] * 2,
            [np.zeros(4, np.uint8) for _ in range(2)],
            add,
            lambda n: 0,
        )


def test_dependencies_are_those_of_the_bytes() -> None:
    steps = [
        Recv(1, Span(OUT, 0, 8)),
        Send(2, Span(OUT, 4, 6)),
        Send(3, Span(OUT, 8, 9)),
        Recv(1, Span(OUT, 5, 10)),
        Send(2, Span(OUT, 0, 5)),
    ]
    assert dependencies(steps) == ((), (0,), (), (0, 1, 2), (0,))


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(UsageError, match="choose from direct, ring, bruck"):
        build("all_gather", "recursive_doubling", Problem(0, 3, receives=(1, 1, 1)))

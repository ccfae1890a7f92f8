"""Collectives through shared memory: what repeats among processes of one host, and what goes wrong there."""

from __future__ import annotations

import asyncio
import gc
import itertools
import mmap
import os
import signal
import sys
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import cloudpickle
import numpy as np
import pytest
from fakes import secret
from harness import BACKENDS, LIMIT_S, until, world

import aiocomm
from aiocomm.collectives.shared import DONE, GOING_ON, NOT_MET, OPEN, STUCK, TURN, Shared, SharedFlight
from aiocomm.launch import WorkerError
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]

pytestmark = pytest.mark.anyio
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers of spawn cannot import this module
SIZES = {"one": 1, "small": 700, "chunks": 90_001, "large": 500_000}  # elements of float64
WAYS = ("shared", "cma", "mapped")
MOST = 3000  # calls among which some must meet, however busy the machine is


def met(comm: aiocomm.Communicator, operation: str, ways: tuple[str, ...] = WAYS) -> int:
    """Calls that met, by their ways: the same number on all ranks, which agree on each."""
    counts = comm.statistics().collectives
    return sum(counts.get(f"{operation}/{way}", 0) for way in ways)


def block(rank: int, turn: int, count: int) -> np.ndarray[Any, Any]:
    """What a rank gives in a turn: no other rank or turn has it, and sums of a few are exact."""
    return ((np.arange(count) * 7 + rank * 13 + turn) % 50).astype(np.float64)


def arrays_of(comm: aiocomm.Communicator, n: int, empty: Callable[..., Any]) -> Arrays:
    """One block, and twice one for each rank."""
    return empty(n, np.float64), empty((comm.size, n), np.float64), empty((comm.size, n), np.float64)


async def _broadcast(comm: aiocomm.Communicator, n: int, turn: int, arrays: Arrays) -> None:
    x, _, _ = arrays
    root = comm.size - 1
    x[:] = block(comm.rank, turn, n)
    await comm.barrier()  # so that all come at nearly one time
    await comm.broadcast(x, root)
    assert np.array_equal(x, block(root, turn, n))


async def _all_gather(comm: aiocomm.Communicator, n: int, turn: int, arrays: Arrays) -> None:
    x, out, _ = arrays
    x[:] = block(comm.rank, turn, n)
    out[:] = -1
    await comm.barrier()  # so that all come at nearly one time
    await comm.all_gather(out, x)
    for rank, one in enumerate(out):
        assert np.array_equal(one, block(rank, turn, n))


async def _all_to_all(comm: aiocomm.Communicator, n: int, turn: int, arrays: Arrays) -> None:
    _, out, more = arrays
    size, me = comm.size, comm.rank
    for rank in range(size):
        more[rank] = block(me * size + rank, turn, n)
    out[:] = -1
    await comm.barrier()  # so that all come at nearly one time
    await comm.all_to_all(out, more)
    for rank, one in enumerate(out):
        assert np.array_equal(one, block(rank * size + me, turn, n))


async def _all_reduce(comm: aiocomm.Communicator, n: int, turn: int, arrays: Arrays) -> None:
    x, _, more = arrays
    x[:] = block(comm.rank, turn, n)
    total = sum(block(rank, turn, n) for rank in range(comm.size))
    await comm.barrier()  # so that all come at nearly one time
    if turn % 2:
        await comm.all_reduce(x)
        assert np.array_equal(x, total)
        return
    more[0], x[:] = x, -1
    await comm.all_reduce(more[0], out=x)
    assert np.array_equal(x, total)


async def _barrier(comm: aiocomm.Communicator, n: int, turn: int, arrays: Arrays) -> None:
    await comm.barrier()


OPERATIONS: dict[str, Callable[..., Awaitable[None]]] = {
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "all_reduce": _all_reduce,
    "barrier": _barrier,
}


async def _everything(comm: aiocomm.Communicator, until_met: bool, way: str = "cma") -> None:
    """Do all of it in all sizes.

    Args:
        until_met: go on until calls have met.
        way: of large calls, where they meet.
    """
    empty = aiocomm.empty if way == "mapped" else np.empty
    for n in SIZES.values():
        arrays = arrays_of(comm, n, empty)
        for operation, do in OPERATIONS.items():
            before = met(comm, operation)
            for turn in range(MOST):
                await do(comm, n, turn, arrays)
                enough = met(comm, operation) > before or not until_met
                if turn >= 5 and enough:  # decided alike by all
                    break
            if until_met:
                assert met(comm, operation) > before, (operation, n)
    for operation in OPERATIONS:
        for other in ("cma", "mapped"):
            if other != way or operation == "barrier":
                assert met(comm, operation, (other,)) == 0
            elif until_met:
                assert met(comm, operation, (other,)) > 0, operation


@pytest.mark.timeout(300)  # calls seldom meet where there are fewer cores than processes, and these are busy
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("way", WAYS)
async def test_what_repeats_goes_through_shared_memory(
    size: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOCOMM_CMA", "off" if way == "shared" else "allow")
    async with aiocomm.spawn(_everything, size - 1, True, way, links="shm") as comm:
        await _everything(comm, True, way)


async def _arrays_of_both_kinds(comm: aiocomm.Communicator) -> None:
    """Rank 0 has its arrays for itself; whether others' are shared differs from call to call."""
    n = SIZES["chunks"]
    for turn in range(MOST):
        empty = aiocomm.empty if comm.rank and turn // 3 % 2 else np.empty
        arrays = arrays_of(comm, n, empty)
        for operation in ("broadcast", "all_gather", "all_to_all", "all_reduce"):
            await OPERATIONS[operation](comm, n, turn, arrays)
        if turn >= 59 and met(comm, "broadcast", ("cma",)) > 0:
            break
    assert met(comm, "broadcast", ("cma",)) > 0
    assert met(comm, "broadcast", ("mapped",)) == 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_arrays_of_both_kinds_may_be_mixed() -> None:
    async with aiocomm.spawn(_arrays_of_both_kinds, 2, links="shm") as comm:
        await _arrays_of_both_kinds(comm)


async def _changed_at_once(comm: aiocomm.Communicator) -> None:
    root = comm.size - 1
    for empty in (np.empty, aiocomm.empty):
        x = empty(SIZES["chunks"], np.float64)
        for turn in range(400):
            x[:] = 10 * turn + comm.rank
            await comm.broadcast(x, root)
            assert (x == 10 * turn + root).all()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("size", [2, 3, 4])
async def test_the_root_may_change_its_array_once_its_call_has_ended(size: int) -> None:
    """Others copy it for each other, not from the root any more."""
    async with aiocomm.spawn(_changed_at_once, size - 1, links="shm") as comm:
        await _changed_at_once(comm)


def _mapped() -> int:
    """Shared arrays that this process has mapped, its own among them."""
    return Path("/proc/self/maps").read_text().count("memfd:aiocomm-array")


async def _arrays_that_end(comm: aiocomm.Communicator) -> None:
    n, before, most = SIZES["chunks"], _mapped(), 0
    for turn in range(MOST):
        x = aiocomm.empty(n, np.float64)
        x[:] = turn if comm.rank == 0 else -1
        await comm.broadcast(x)
        assert (x == turn).all()
        most = max(most, _mapped() - before)
        del x
        if turn >= 199 and met(comm, "broadcast", ("mapped",)) >= 20:
            break
    assert met(comm, "broadcast", ("mapped",)) > 0
    await comm.barrier()
    # Its own, those of the others, and what these have freed since they said so last.
    assert 2 <= most <= 2 * comm.size
    assert comm.rank != 0 or _mapped() - before <= most


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_shared_arrays_that_were_freed_are_not_kept_by_others() -> None:
    before = _mapped()
    async with aiocomm.spawn(_arrays_that_end, 2, links="shm") as comm:
        await _arrays_that_end(comm)
    gc.collect()
    assert _mapped() == before


async def _out_of_reach(comm: aiocomm.Communicator, x: np.ndarray[Any, Any]) -> None:
    for turn in range(MOST):
        x[:] = turn % 251 if comm.rank == 0 else 0
        await comm.broadcast(x)
        assert (x == turn % 251).all()
        if turn > 20 and met(comm, "broadcast") > 5:
            break
    assert met(comm, "broadcast", ("cma",)) == 0
    assert met(comm, "broadcast") > 5


@pytest.mark.skipif(secret.MISSING is not None, reason=str(secret.MISSING))
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_arrays_that_no_other_process_reaches_go_by_rings() -> None:
    async with aiocomm.spawn(_out_of_reach, 1, np.empty(200_000, np.uint8), links="shm") as comm:
        await _out_of_reach(comm, secret.secret_array(200_000))


async def test_a_rank_whose_loop_is_another_has_the_same_results() -> None:
    async with aiocomm.spawn(_everything, 1, False, links="shm") as comm:
        await _everything(comm, False)


async def _until_the_loop_went_round(comm: aiocomm.Communicator) -> None:
    """Calls one after another, until each rank's loop has had a turn for others."""
    loop, turns = asyncio.get_running_loop(), []

    def turn() -> None:
        turns.append(None)
        loop.call_later(0, turn)  # which does not keep the loop from waiting: nothing is ready

    loop.call_later(0, turn)
    given, least = np.zeros(1), np.zeros(1)
    for _ in range(100 * MOST):
        given[0] = len(turns)
        await comm.all_reduce(given, "min", out=least)
        if least[0] >= 3:  # all see that in the same call
            return
    raise AssertionError("calls that never wait leave no turn to others")


@pytest.mark.parametrize(
    "anyio_backend", [BACKENDS["asyncio"], BACKENDS["uvloop"]], ids=["asyncio", "uvloop"], indirect=True
)
async def test_other_tasks_have_their_turn() -> None:
    async with aiocomm.spawn(_until_the_loop_went_round, 1, links="shm") as comm:
        await _until_the_loop_went_round(comm)


async def _odd(comm: aiocomm.Communicator) -> None:
    words = np.array([f"{comm.rank}{i}" for i in range(30_000)], "S6")
    everywhere = np.empty((comm.size, len(words)), "S6")
    x = np.empty(70_000)
    for turn in range(MOST):
        everywhere[:] = b""
        await comm.all_gather(everywhere, words)
        for rank, one in enumerate(everywhere):
            assert one[-1] == f"{rank}29999".encode()
        x[:] = comm.rank + turn
        await comm.all_reduce(x, sm_budget=8 if turn % 3 else None)  # it says nothing of host arrays
        assert (x == sum(range(comm.size)) + turn * comm.size).all()
        if turn >= 59 and met(comm, "all_gather") > 0:
            break
    assert met(comm, "all_gather") > 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_elements_of_any_size_and_options_that_do_not_matter() -> None:
    async with aiocomm.spawn(_odd, 1, links="shm") as comm:
        await _odd(comm)


async def _alike_in_all_ways(comm: aiocomm.Communicator) -> None:
    rng = np.random.default_rng(comm.rank)
    for n in (900, 60_000):
        given = rng.standard_normal(n).astype(np.float32)
        results = set()
        for _ in range(60):
            x = given.copy()
            await comm.all_reduce(x)
            results.add(x.tobytes())
        everywhere = np.empty((comm.size, n), np.float32)
        await comm.all_gather(everywhere, x)
        assert all(np.array_equal(one, x) for one in everywhere)
        assert len(results) == 1, "the bits depend on the way"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_sums_have_the_same_bits_through_shared_memory_and_by_messages() -> None:
    async with aiocomm.spawn(_alike_in_all_ways, 2, links="shm") as comm:
        await _alike_in_all_ways(comm)


async def _calls_at_once(comm: aiocomm.Communicator) -> None:
    outs = [np.empty((comm.size, 5000)) for _ in range(4)]

    async def one(number: int, turn: int) -> None:
        await comm.all_gather(outs[number], block(comm.rank + 10 * number, turn, 5000))

    for turn in range(40):
        async with anyio.create_task_group() as tasks:
            for number in range(len(outs)):
                tasks.start_soon(one, number, turn)
        for number, out in enumerate(outs):
            for rank, row in enumerate(out):
                assert np.array_equal(row, block(rank + 10 * number, turn, 5000))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_calls_that_overlap_do_not_mix() -> None:
    async with aiocomm.spawn(_calls_at_once, 2, links="shm") as comm:
        await _calls_at_once(comm)


async def _differing(comm: aiocomm.Communicator) -> None:
    x = np.empty(100)
    for root in (0, 1, 0, 1):
        for _ in range(20):
            await comm.broadcast(x, root)
    for _ in range(10):
        with pytest.raises(aiocomm.UsageError, match="all ranks must call alike"):
            await comm.broadcast(x, comm.rank)
        x[:] = comm.rank
        await comm.broadcast(x, 1)
        assert (x == 1).all()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_calls_that_differ_are_found_by_all() -> None:
    async with aiocomm.spawn(_differing, 1, links="shm") as comm:
        await _differing(comm)


GOING = pytest.mark.parametrize(
    "going",
    [("shared", "all_reduce"), *itertools.product(("cma", "mapped"), ("all_reduce", "broadcast"))],
    ids="-".join,
    indirect=True,
)
COUNT = 4_000_000  # elements that take more than one turn


@pytest.fixture
def going(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Way and operation: calls that come first go from array to array, where they may."""
    monkeypatch.setenv("AIOCOMM_CMA", "off" if request.param[0] == "shared" else "allow")
    return request.param


class Met:
    """What a call asks of the extension: once its ranks have met, `met` says whether it goes on here.

    Ranks see that they have met at different times, and those that go on may end the call for one that stands
    still before it has seen anything.
    """

    def __init__(self, native: Any, result: int, met: Callable[[], bool]) -> None:
        self._native, self._met, self._goes_on = native, met, True
        self._waits = self._look(result)

    def _look(self, result: int) -> bool:
        """Whether the ranks have yet to meet."""
        if result in (GOING_ON, STUCK):
            self._goes_on = self._met()
        return result == OPEN

    def proceed(self, seconds: float) -> int:
        if not self._goes_on:
            return STUCK
        result: int = self._native.proceed(seconds)
        if self._waits:
            self._waits = self._look(result)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


async def _until_one_goes_on(
    comm: aiocomm.Communicator, going: tuple[str, str], goes_on: Callable[[Any], bool]
) -> None:
    """Call until the ranks have met in a large call that goes that way; does it go on here?"""
    way, operation = going
    flight = Shared.flight

    def other(self: Shared, number: int, result: int, deadline: float | None) -> Any:
        ours = flight(self, number, result, deadline)

        def this_way() -> bool:
            return self.counted != f"{operation}/{way}" or goes_on(ours)

        ours._native = Met(ours._native, result, this_way)  # type: ignore[assignment]
        return ours

    Shared.flight = other  # type: ignore[method-assign]
    x = (aiocomm.empty if way == "mapped" else np.empty)(COUNT, np.float64)
    x[:] = 0
    try:
        for _ in range(MOST):
            await getattr(comm, operation)(x, deadline=30)
    finally:
        Shared.flight = flight  # type: ignore[method-assign]
    raise AssertionError("no call met")


async def _killed(comm: aiocomm.Communicator, going: tuple[str, str]) -> None:
    def die(flight: Any) -> bool:
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    with pytest.raises(aiocomm.PeerLostError) as lost:
        await _until_one_goes_on(comm, going, die)
    assert lost.value.peer == 1
    left = await comm._members().shrink(deadline=LIMIT_S)
    for _ in range(20):
        x = np.full(COUNT // 100, comm.rank)
        await left.all_reduce(x)
        assert (x == 2).all()


@GOING
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_rank_killed_in_a_call_is_named_and_the_rest_go_on(going: tuple[str, str]) -> None:
    with pytest.raises(WorkerError) as caught:
        async with aiocomm.spawn(_killed, 2, going, links="shm") as comm:
            await _killed(comm, going)
    assert caught.value.rank == 1
    assert caught.value.exit_code == -signal.SIGKILL


async def _cancelled(comm: aiocomm.Communicator, going: tuple[str, str]) -> None:
    with anyio.CancelScope() as scope:

        def cancel(flight: Any) -> bool:
            if comm.rank == 1:
                scope.cancel()
            return comm.rank == 1  # the others do not end it before that

        if comm.rank == 1:
            await _until_one_goes_on(comm, going, cancel)
        with pytest.raises(aiocomm.TransferCancelled, match="cancelled"):
            await _until_one_goes_on(comm, going, cancel)
    assert scope.cancelled_caught == (comm.rank == 1)
    before = met(comm, "all_reduce")
    for _ in range(20):
        x = np.full(COUNT // 100, comm.rank)
        await comm.all_reduce(x)
        assert (x == sum(range(comm.size))).all()
    assert met(comm, "all_reduce") == before, "what has failed once is not used again"


@GOING
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_call_that_is_cancelled_at_one_rank_ends_at_all(going: tuple[str, str]) -> None:
    async with aiocomm.spawn(_cancelled, 2, going, links="shm") as comm:
        await _cancelled(comm, going)


async def _late(comm: aiocomm.Communicator, going: tuple[str, str]) -> None:
    """The deadline of one passes while another stands still, once all have met."""

    def be_late(flight: Any) -> bool:
        if comm.rank == 0:
            flight._ends = time.monotonic()
        return comm.rank == 2

    error = aiocomm.DeadlineExceeded if comm.rank == 0 else aiocomm.AiocommError
    with pytest.raises(error, match=going[1]):
        await _until_one_goes_on(comm, going, be_late)
    for _ in range(20):
        x = np.full(COUNT // 100, comm.rank)
        await comm.all_reduce(x)
        assert (x == sum(range(comm.size))).all()


@pytest.mark.parametrize("going", [(way, "all_reduce") for way in WAYS], ids="-".join, indirect=True)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_deadline_that_passes_in_a_call_ends_it_at_all(going: tuple[str, str]) -> None:
    async with aiocomm.spawn(_late, 2, going, links="shm") as comm:
        await _late(comm, going)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_call_that_waits_for_the_end_of_the_last_one_has_its_arrays(
    pair: tuple[aiocomm.Communicator, aiocomm.Communicator],
) -> None:
    """The root ends first, and calls again: it cannot tell the others of that call before all have ended."""
    nbytes = 8 << 20
    arena = _core.Arena.create(2)
    arenas = [arena, _core.Arena.open(arena.place, 1, 2)]
    calls = [_core.SharedCall(one, 1, 0, [nbytes], False, 1, "u1", "", b"broadcast") for one in arenas]
    arrays = [np.zeros(nbytes, np.uint8) for _ in calls]

    async def begin(rank: int, number: int) -> int:
        """`NOT_MET` where the loop has something else to do: then nobody makes that call."""
        await anyio.lowlevel.checkpoint()
        return calls[rank].attempt(pair[rank]._engine, number, None, arrays[rank])

    async def twice(number: int) -> bool:
        """The second call begins at the root while the first goes on. False: they did not meet."""
        arrays[0][:] = 0
        first = await begin(0, number)
        assert first in (NOT_MET, OPEN)
        second = await begin(1, number)
        while first > TURN:
            first = calls[0].proceed(1e-3)
            if first > TURN:
                second = calls[1].proceed(1e-3)
        if first == NOT_MET:
            return False
        assert second > TURN  # some of it lies in the arena
        arrays[0][:] = 7
        first = await begin(0, number + 1)
        assert first in (NOT_MET, OPEN)
        while second > TURN:
            second = calls[1].proceed(1e-3)
        assert not arrays[1].any()
        second = await begin(1, number + 1)
        while first > TURN or second > TURN:
            first = calls[0].proceed(1e-3) if first > TURN else first
            second = calls[1].proceed(1e-3) if second > TURN else second
        return first != NOT_MET

    number = 1
    while not await twice(number):
        number += 2
    assert (arrays[1] == 7).all()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_arrays_are_kept_while_somebody_who_stands_still_is_inside(
    pair: tuple[aiocomm.Communicator, aiocomm.Communicator],
) -> None:
    """Their call is collected, and given up by that: whoever was stopped goes on later, and writes."""
    nbytes = 8 << 20
    arena = _core.Arena.create(2)
    process, fd, _ = place = arena.place
    entered = 3456 + 64  # of rank 1: Arena::Control in core/arena.cpp
    for one in (arenas := [arena, _core.Arena.open(place, 1, 2)]):
        one.set_processes([process, process])
    calls = [_core.SharedCall(one, 1, 0, [nbytes], False, 1, "u1", "", b"broadcast") for one in arenas]
    array = np.zeros(nbytes, np.uint8)
    kept = weakref.ref(array)
    result, number = NOT_MET, 0
    while result == NOT_MET:  # the loop had something else to do
        await anyio.lowlevel.checkpoint()
        number += 1
        result = calls[0].attempt(pair[0]._engine, number, None, array)
    assert result == OPEN
    del array
    with mmap.mmap(fd, 0) as memory:
        memory[entered] = 1
        del calls[0]
        gc.collect()
        assert kept() is not None
        memory[entered] = 0
    _core.SharedCall(arena, 1, 0, [nbytes], False, 1, "u1", "", b"broadcast")
    gc.collect()
    assert kept() is None


class Slow:
    """A call that waits for a third rank until it is told to end."""

    moved, error = 0, 0

    def __init__(self) -> None:
        self.result, self.looked = STUCK, 0

    def proceed(self, seconds: float) -> int:
        self.looked += 1
        return self.result

    def abandon(self) -> bool:
        return True


async def test_one_that_leaves_has_done_its_part() -> None:
    async with world(2, warmup=True) as (comm, other):
        scope = comm._members()._scope(None)
        native: Any = Slow()
        flight = SharedFlight(scope, "all_to_all", None, native, scope.begin(None), STUCK)
        done: list[bool] = []

        async def run() -> None:
            done.append(await flight.run())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await until(lambda: flight._flying)  # it watches who leaves
            await other.aclose()
            await until(lambda: not flight._flying)
            looked = native.looked
            await until(lambda: native.looked > looked + 3)
            native.result = DONE
        assert done == [True]


@pytest.mark.parametrize("how", ["tells", "leaves", "is late"])
async def test_the_reason_for_which_a_call_was_given_up_may_take_its_time(how: str) -> None:
    """Whoever gives a call up may stand still between ending it for all and telling why."""
    async with world(2, warmup=True) as (comm, other):
        scope, theirs = comm._members()._scope(None), other._members()._scope(None)
        native: Any = Slow()
        number = scope.begin(None)
        limit = 0.5 if how == "is late" else None
        flight = SharedFlight(scope, "all_to_all", limit, native, number, _core.BROKEN)
        ended: list[BaseException] = []
        looked: list[bool] = []
        late = flight._late

        def look() -> bool:
            looked.append(late())
            return looked[-1]

        flight._late = look  # type: ignore[method-assign]

        async def run() -> None:
            with pytest.raises(aiocomm.AiocommError) as caught:
                await flight.run()
            ended.append(caught.value)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            if how == "leaves":
                await other.aclose()
            elif how == "tells":
                await until(lambda: len(looked) > 50)  # it goes on waiting
                assert not ended
                theirs.abort(number, aiocomm.DeadlineExceeded("its time was over"))
        (error,) = ended
        kind, text = {
            "tells": (aiocomm.TransferCancelled, "rank 1 gave the call up: its time was over"),
            "leaves": (aiocomm.TransferCancelled, "another rank has given it up"),
            "is late": (aiocomm.DeadlineExceeded, "not moved within 0.5 s"),
        }[how]
        assert type(error) is kind
        assert text in str(error)

"""Dispatch and combine like those before, by one call into the extension; and what happens where it stops."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from typing import Any, ClassVar

import cloudpickle
import numpy as np
import pytest
from fakes import simulated
from fakes.gpu import Driver, Stream
from gpu_experts import EXPERTS, LINKS, Rows, batch, layer, on_gpu, to_host
from harness import all_call, world

import aiocomm
from aiocomm.collectives import kernels
from aiocomm.moe import device_exchange, device_quick, repeats
from aiocomm_native import _core

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers of spawn cannot import this module
pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu", "images")]
in_processes = pytest.mark.parametrize("anyio_backend", ["asyncio"])


class _Counted:
    """The calls of the extension; counts the stages that they reach."""

    stages: ClassVar[Counter[tuple[str, int]]] = Counter()

    def __init__(self, *how: Any) -> None:
        self._calls = _core.ExpertCalls(*how)
        self.give_tokens, self.give_terms = self._calls.give_tokens, self._calls.give_terms

    def _made(self, name: str, *arguments: Any) -> Any:
        outcome = getattr(self._calls, name)(*arguments)
        self.stages[name, outcome[0]] += 1
        return outcome

    def dispatch(self, *arguments: Any) -> Any:
        return self._made("dispatch", *arguments)

    def combine(self, *arguments: Any) -> Any:
        return self._made("combine", *arguments)


def _patiently() -> Counter[tuple[str, int]]:
    """Have what is waited for looked for until it is there; counts stages by the calls that reached them."""
    if simulated.choose() is not None:
        kernels.compiled = lambda source, architecture: source.encode() + b"\0"
    device_quick.LINGER_S = 10.0
    _Counted.stages.clear()
    repeats.ExpertCalls = _Counted  # type: ignore[misc,assignment]
    return _Counted.stages


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, too, may be patient."""
    monkeypatch.setattr(kernels, "compiled", kernels.compiled)
    monkeypatch.setattr(device_quick, "LINGER_S", device_quick.LINGER_S)
    monkeypatch.setattr(repeats, "ExpertCalls", _core.ExpertCalls)


def test_heads_are_as_python_has_them() -> None:
    assert _core.DEVICE_HEAD_BYTES == device_exchange.DEVICE_HEAD_BYTES


# ------------------------------------------------------------ between processes


async def _alike(comm: aiocomm.Communicator) -> None:
    stages = _patiently()
    for tokens, hidden in ((37, 64), (30, 7), (1, 8)):
        for _ in range(20):
            await layer(comm, tokens, hidden)
            await layer(comm, tokens, hidden, ids_on_gpu=False)
    assert stages["dispatch", 3]
    assert stages["combine", 3]


@in_processes
@pytest.mark.parametrize("size", [2, 3])
async def test_calls_that_are_alike(gpu: Driver, size: int) -> None:
    async with aiocomm.spawn(_alike, n=size - 1, links=LINKS) as comm:
        await _alike(comm)


async def _until_at_once(
    comm: aiocomm.Communicator, stages: Counter[tuple[str, int]], operation: str, call: Any
) -> None:
    """Repeat calls until the extension makes them from begin to end, at all ranks."""
    ready = np.array([False])
    while not ready[0]:
        before = stages[operation, 3]
        await call()
        ready[0] = stages[operation, 3] > before
        await comm.all_reduce(ready, "min")


async def _more(comm: aiocomm.Communicator, hidden: int, choices: int, few: int) -> None:
    """Of a call like those before comes so much that what they were given memory for does not hold it."""
    stages = _patiently()
    x = on_gpu(comm.rank, np.full((50, hidden), comm.rank + 1, np.float32))
    ids = np.full((50, choices), -1)
    ids[:few, :2] = 0, 1
    await _until_at_once(comm, stages, "dispatch", lambda: comm.dispatch(x, ids, experts=2))
    before = stages["dispatch", 3]
    ids[:] = np.resize([0, 1], choices)
    came = await comm.dispatch(x, ids, experts=2)
    assert stages["dispatch", 3] == before
    assert came.starts.tolist() == [0, 50, 100]
    assert to_host(came.tokens, np.float32)[:, 0].tolist() == [1] * 50 + [2] * 50
    outputs = on_gpu(comm.rank, np.ones((len(came.rows), hidden), np.float32))
    assert (to_host(await comm.combine(outputs, came), np.float32) == choices).all()


@in_processes
@pytest.mark.parametrize(("hidden", "choices", "few"), [(1024, 2, 1), (8, 400, 50)], ids=["rows", "choices"])
async def test_more_comes_than_there_is_memory_for(gpu: Driver, hidden: int, choices: int, few: int) -> None:
    async with aiocomm.spawn(_more, 1, hidden, choices, few, links=LINKS) as comm:
        await _more(comm, hidden, choices, few)


async def _over_outputs(comm: aiocomm.Communicator) -> None:
    """The result of the last call lies over what it is made of, which is read until all of it is written."""
    stages = _patiently()
    x, ids, weights = batch(comm.rank, 30, 16)
    expected = await comm.dispatch(x, ids, weights, experts=EXPERTS)
    outputs = expected.inputs * np.float32(1.7)
    wanted = await comm.combine(outputs, expected)
    whole, out = on_gpu(comm.rank, outputs), on_gpu(comm.rank, np.zeros_like(x))
    given = [on_gpu(comm.rank, one) for one in (x, ids, weights)]

    async def call(out: Any) -> None:
        came = await comm.dispatch(*given, experts=EXPERTS)
        await comm.combine(whole, came, out=out)

    await _until_at_once(comm, stages, "combine", lambda: call(out))
    await call(Rows(whole, len(x)))
    assert whole.numpy()[: len(x)].tobytes() == wanted.tobytes()


@in_processes
async def test_a_result_over_outputs(gpu: Driver) -> None:
    async with aiocomm.spawn(_over_outputs, n=1, links=LINKS) as comm:
        await _over_outputs(comm)


async def _unlike(comm: aiocomm.Communicator) -> None:
    _patiently()
    for _ in range(3):
        await layer(comm, 30, 16)
    x, ids, weights = batch(comm.rank, 30, 16)
    with pytest.raises(aiocomm.UsageError, match="all ranks must call alike"):
        await comm.dispatch(on_gpu(comm.rank, x), ids, weights, experts=EXPERTS + comm.rank)
    ragged = [[0], *ids.tolist()[1:]]
    for name in ("expert_ids", "weights"):
        call: dict[str, Any] = {"expert_ids": ids, "weights": weights}
        with pytest.raises(aiocomm.UsageError, match=f"rank 1 refused its call: {name} cannot be made"):
            await comm.dispatch(
                on_gpu(comm.rank, x), experts=EXPERTS, **(call | {name: ragged} if comm.rank else call)
            )
    if comm.rank:
        ids = ids.copy()
        ids[3, 1] = EXPERTS
    with pytest.raises(aiocomm.UsageError, match=f"token 3 names expert {EXPERTS}"):
        await comm.dispatch(on_gpu(comm.rank, x), on_gpu(comm.rank, ids), weights, experts=EXPERTS)
    came = await comm.dispatch(on_gpu(comm.rank, x), ids.clip(0, EXPERTS - 1), weights, experts=EXPERTS)
    outputs = on_gpu(comm.rank, np.ones((len(came.rows), 16), np.float32))
    with pytest.raises(aiocomm.UsageError, match="all ranks must call alike"):
        await comm.combine(outputs, came, wire="float16" if comm.rank else None)
    await layer(comm, 30, 16)


@in_processes
async def test_calls_that_differ_where_those_before_did_not(gpu: Driver) -> None:
    async with aiocomm.spawn(_unlike, n=1, links=LINKS) as comm:
        await _unlike(comm)


async def _lie(comm: aiocomm.Communicator) -> None:
    stages = _patiently()
    form, forms = _core.DispatchForm, []

    def noted(*how: Any) -> Any:
        forms.append(how)
        return form(*how)

    _core.DispatchForm = noted  # type: ignore[assignment,misc]
    for _ in range(3):
        await layer(comm, 30, 16)
    _core.DispatchForm = form  # type: ignore[misc]
    made = _Counted.dispatch
    if comm.rank:

        def lied_about(calls: Any, *arguments: Any) -> Any:
            how = forms[-1]  # of calls that are alike, however often they were prepared
            assert how[8] == 30 * 16 * 4
            lying = form(*how[:8], how[8] - 1, *how[9:])  # it says that it has a byte less than it has
            return made(calls, *arguments[:2], lying, *arguments[3:])

        _Counted.dispatch = lied_about  # type: ignore[method-assign]
    x, ids, weights = batch(comm.rank, 30, 16)
    ids[-1] = 0, EXPERTS - 1, -1  # so that the last token is for both
    before = stages["dispatch", 2]
    lied = on_gpu(comm.rank, x), on_gpu(comm.rank, ids), on_gpu(comm.rank, weights)
    if comm.rank:
        with contextlib.suppress(aiocomm.TransferCancelled):  # it may have ended before the other found out
            await comm.dispatch(*lied, experts=EXPERTS)
    else:
        with pytest.raises(aiocomm.PeerError, match="has 1919 bytes where 1920 are needed"):
            await comm.dispatch(*lied, experts=EXPERTS)
        assert stages["dispatch", 2] > before
    _Counted.dispatch = made  # type: ignore[method-assign]
    await layer(comm, 30, 16)


@in_processes
async def test_memory_that_is_not_there_is_not_read(gpu: Driver) -> None:
    async with aiocomm.spawn(_lie, n=1, links=LINKS) as comm:
        await _lie(comm)


async def _without_a_pause(comm: aiocomm.Communicator) -> None:
    """Until a timer that is due has run in the turn that a call gave up at its end, at each rank."""
    _patiently()
    ran: list[None] = []
    seen = False
    loop, turn = asyncio.get_running_loop(), comm._backend.turn

    async def noted() -> None:
        nonlocal seen
        before = len(ran)
        await turn()
        seen = seen or len(ran) > before

    comm._backend.turn = noted  # type: ignore[method-assign]
    given = on_gpu(comm.rank, np.zeros((4, 8), np.float32))
    for _ in range(3000):
        given.write(np.full((4, 8), seen, np.float32))
        timer = loop.call_later(0, ran.append, None)
        came = await comm.dispatch(given, np.tile([0, EXPERTS - 1], (4, 1)), experts=EXPERTS)
        timer.cancel()
        if to_host(came.tokens, np.float32).all():  # all ranks see that in the same call
            return
    pytest.fail("calls that never wait leave no turn to others")


@in_processes
async def test_other_tasks_have_their_turn(gpu: Driver) -> None:
    async with aiocomm.spawn(_without_a_pause, n=1, links=LINKS) as comm:
        await _without_a_pause(comm)


async def _one_form_at_a_time(comm: aiocomm.Communicator) -> None:
    """What was taken ahead for a call of another form goes back to the pool."""
    _patiently()
    owners = set()
    for _ in range(6):
        for tokens in (21, 30):
            await layer(comm, tokens, 16)
            (pool,) = comm._members()._expert_scope(None)[0].pools.values()
            if pool.ahead is not None:
                owner, (_, slab, *_), _ = pool.ahead
                assert owner is pool.last_dispatch
                assert slab not in pool._free.get(slab.nbytes, [])
                owners.add(owner)
    assert len(owners) == 2


@in_processes
async def test_memory_is_taken_ahead_for_one_form_at_a_time(gpu: Driver) -> None:
    async with aiocomm.spawn(_one_form_at_a_time, n=1, links=LINKS) as comm:
        await _one_form_at_a_time(comm)


# ------------------------------------------------------------ on one loop, where others go on in between


@pytest.mark.parametrize("linger_s", [0.0, 1e-3])
async def test_wherever_it_stops_it_goes_on(monkeypatch: pytest.MonkeyPatch, linger_s: float) -> None:
    monkeypatch.setattr(device_quick, "LINGER_S", linger_s)
    async with world(3, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            for tokens in (37, 37, 37, 0, 37, 20, 20):
                await layer(comm, tokens, 16)

        await all_call(members, rank)


async def test_more_comes_than_before() -> None:
    """Memory that was taken for what is likely is not written over."""
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            x = on_gpu(comm.rank, np.full((50, 16), comm.rank + 1, np.float32))
            for ids in (np.full((50, 2), -1), np.zeros((50, 2), np.int64), np.tile([0, 1], (50, 1))) * 2:
                ids[0] = 0, 1
                came = await comm.dispatch(x, ids, experts=2)
                outputs = on_gpu(comm.rank, np.ones((len(came.rows), 16), np.float32))
                result = on_gpu(comm.rank, np.zeros((50, 16), np.float32))
                await comm.combine(outputs, came, out=result)
                assert np.array_equal(result.numpy()[:, 0], (ids >= 0).sum(1).astype(np.float32))

        await all_call(members, rank)


async def test_a_stream_that_is_gone(simulator: simulated.Simulator) -> None:
    """Refused on all ranks, also where calls before were like this one. NVIDIA's driver may crash instead."""
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            x, ids, weights = batch(comm.rank, 30, 16)
            given = on_gpu(comm.rank, x)
            stream = Stream(device=comm.rank)
            for _ in range(3):
                await comm.dispatch(given, ids, weights, experts=EXPERTS, stream=stream)
            handle = stream.handle
            stream.close()
            with pytest.raises(aiocomm.UsageError):
                await comm.dispatch(
                    given, ids, weights, experts=EXPERTS, stream=handle if comm.rank else None
                )
            await layer(comm, 30, 16)

        await all_call(members, rank)


async def test_when_other_tasks_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[None] = []

    async def turn() -> None:
        turns.append(None)

    async with world(1, links=LINKS) as (comm,):
        await layer(comm, 11, 8)
        comm._backend.turn = turn  # type: ignore[method-assign]
        for where in (device_exchange, repeats):
            monkeypatch.setattr(where, "TURN_S", 0.0)
        waited = property(lambda _: False, lambda *_: None)  # whatever the loop did
        monkeypatch.setattr(device_exchange.DeviceExchange, "suspended", waited, raising=False)
        await layer(comm, 11, 8)
        assert len(turns) == 2  # after dispatch and after combine

"""How kernels of dispatch and combine are launched: by which thread, and what waits for it."""

from __future__ import annotations

import gc
import struct
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from fakes import simulated
from fakes.gpu import Driver, Stream
from gpu_experts import EXPERTS, LINKS, batch, layer, on_gpu
from harness import until, world

from aiocomm.collectives import flight, kernels
from aiocomm.errors import LinkError
from aiocomm.moe import device_exchange, memory, sources
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    import aiocomm

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu", "images")]


class Launcher:
    """Launches a kernel that has nothing to do."""

    def __init__(self, comm: aiocomm.Communicator) -> None:
        self._comm = comm
        self.pool = memory.Pool(comm._engine, 0)
        self._function = self.pool.kernels.entry(sources.MOVE_SOURCE, "move_rows")

    def issued(self) -> int:
        """Launches and copies that the loop has made by itself."""
        return self._comm.links["cuda"].statistics().device["gpu0.by_loop"]

    def launch(self) -> tuple[Any, bool]:
        """The transfer, and whether the loop has launched it before the call came back."""
        before = self.issued()
        argument = bytes(struct.calcsize(sources.MOVE))
        where = self.pool.home, [], [], self._comm.rank, 0
        launched, waits = self._comm._engine.launch(
            self._function, 1, kernels.THREADS, argument, *where, 0, -1.0
        )
        assert not waits
        return launched, self.issued() > before


# ------------------------------------------------------------ the interpreter's lock


def _while_held(simulator: simulated.Simulator, call: str, act: Callable[[], Any]) -> Any:
    """Do something whose call of the driver goes on when a thread of Python has run."""
    let_go = []

    def run() -> None:
        simulator.wait_held()
        let_go.append(simulator.let_go())

    simulator.hold(call)
    thread = threading.Thread(target=run)
    thread.start()
    result = act()
    thread.join()
    assert let_go == [True]
    return result


async def test_threads_of_python_run_while_the_driver_launches(
    gpu: Driver, simulator: simulated.Simulator
) -> None:
    async with world(1, links=LINKS) as (comm,):
        await layer(comm, 5, 16)
        launcher = Launcher(comm)
        for _ in range(100):  # the copy thread may be awake, and come first
            launched, by_loop = _while_held(simulator, "cuLaunchKernel", launcher.launch)
            await launched
            if by_loop:
                break
        assert by_loop


@pytest.mark.parametrize(
    "call", ["cuMemcpyAsync", "cuStreamQuery", "cuPointerGetAttribute", "cuCtxGetDevice"]
)
async def test_threads_of_python_run_while_the_driver_is_asked(
    gpu: Driver, simulator: simulated.Simulator, call: str
) -> None:
    async with world(1, links=LINKS) as (comm,):
        pool = memory.Pool(comm._engine, 0)
        block, data, context = pool.take(64, frozenset()), pool.take_pinned(64), pool.kernels.context
        stream = pool.kernels.stream
        gpu.use(0)
        acts: dict[str, Callable[[], Any]] = {
            "cuMemcpyAsync": lambda: _core.copy_on(context, stream, block.address, data.address, 64),
            "cuStreamQuery": lambda: _core.stream_is_idle(context, stream),
            "cuPointerGetAttribute": lambda: _core.device_of(block.address),
            "cuCtxGetDevice": _core.current_device,
        }
        assert _while_held(simulator, call, acts[call]) in (None, True, 0)
        pool.kernels.synchronize()


# ------------------------------------------------------------ what a loop does not wait for


async def test_a_loop_leaves_streams_that_fail_to_the_copy_thread(
    gpu: Driver, simulator: simulated.Simulator
) -> None:
    """Which tries once more, and waits for what the stream has only then."""
    async with world(1, links=LINKS) as (comm,):
        await layer(comm, 5, 16)
        launcher = Launcher(comm)
        for _ in range(100):
            waited = simulator.calls("cuStreamSynchronize")
            simulator.fail("cuStreamWriteValue32", 1)
            launched, by_loop = launcher.launch()
            if by_loop:
                await launched
                assert simulator.calls("cuStreamSynchronize") == waited
                break
            with pytest.raises(LinkError):  # by the copy thread, with the same failure
                await launched
            simulator.heal()
        assert by_loop


async def test_a_loop_launches_nothing_while_a_module_is_loaded(
    gpu: Driver, simulator: simulated.Simulator
) -> None:
    """The driver would have it wait for that; the copy thread waits instead."""
    async with world(1, links=LINKS) as (comm,):
        await layer(comm, 5, 16)
        launcher = Launcher(comm)
        simulator.hold("cuModuleLoadData")
        source = sources.sums_source("float16", "float16", "float16")
        load = launcher.pool.kernels.entry
        thread = threading.Thread(target=load, args=(source, "add_rows"))
        thread.start()
        simulator.wait_held()
        for _ in range(20):
            launched, by_loop = launcher.launch()
            await launched
            assert not by_loop
        assert simulator.let_go()
        thread.join()
        for _ in range(100):
            launched, by_loop = launcher.launch()
            await launched
            if by_loop:
                break
        assert by_loop


async def test_only_own_kernels_are_looked_for_longer(
    gpu: Driver, simulator: simulated.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what the caller has queued before them, which takes as long as it takes."""
    looked: list[float] = []

    def look(_: Any, seconds: float, __: bool) -> bool:
        looked.append(seconds)
        return False

    async with world(1, links=LINKS) as (comm,):
        await layer(comm, 5, 16)
        x, ids, _ = batch(0, 30, 16)
        given = on_gpu(0, x)
        stream = Stream(device=0)
        monkeypatch.setattr(flight._core, "linger", look)
        monkeypatch.setattr(flight, "_BREATH_S", 60.0)

        async def dispatch() -> None:
            await comm.dispatch(given, ids, experts=EXPERTS, stream=stream)

        gc.collect()  # freeing memory waits for what the GPU does
        async with anyio.create_task_group() as tasks:
            gate = stream.gate()
            tasks.start_soon(dispatch)
            await until(lambda: looked)
            assert set(looked) == {flight.LINGER_S}
            gate.open()
        looked.clear()
        async with anyio.create_task_group() as tasks:
            simulator.pause(0, simulated.Engine.LOCAL)
            tasks.start_soon(dispatch)
            await until(lambda: looked)
            assert set(looked) == {device_exchange.LINGER_S}
            simulator.resume(0, simulated.Engine.LOCAL)
        stream.close()

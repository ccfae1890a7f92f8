"""GPU memory on a loop that spins (`aiocomm.run(spin=…)`): part of test_gpu.py, and who moves it then."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from fakes.gpu import DeviceArray
from harness import world
from links.test_gpu import (  # noqa: F401
    both,
    other_device,
    pair,
    random,
    test_a_receive_waits_for_its_stream,
    test_a_send_waits_for_its_stream,
    test_an_array_made_on_a_gpu,
    test_cancelled_before_and_after_the_match,
    test_closing_with_transfers_under_way,
    test_gpu_to_gpu,
    test_gpu_to_host,
    test_host_to_gpu,
    test_memory_of_every_kind,
    test_messages_keep_their_order_behind_a_busy_stream,
)
from links.test_gpu_giving_back import (  # noqa: F401
    test_the_loop_goes_on_while_memory_waits_to_be_freed,
)
from links.test_gpu_onesided import (  # noqa: F401
    test_notifications_keep_the_order_of_small_puts,
)
from links.test_spinning import anyio_backend  # noqa: F401

if TYPE_CHECKING:
    from conftest import Pair
    from fakes.simulated import Simulator

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]


async def test_the_loop_issues_copies_itself(pair: Pair) -> None:  # noqa: F811
    a, b = pair
    sources = [DeviceArray(4096).write(random(4096, seed)) for seed in range(4)]
    into = [DeviceArray(4096, device=other_device()) for _ in sources]

    def issued() -> int:
        counted = [comm.links["cuda"].statistics().device for comm in pair]
        return sum(count for found in counted for key, count in found.items() if key.endswith(".by_loop"))

    # A copy is left to its thread where that is awake just then; what goes through host memory always.
    by_loop = "tcp" not in a.links
    for turn in itertools.count():
        one = turn % len(sources)
        await both(a.send(sources[one], 1), b.recv(into[one], 0))
        if turn >= 200 and (issued() or not by_loop):  # in time, or the test has taken too long
            break
    for seed, array in enumerate(into):
        assert (array.numpy() == random(4096, seed)).all()
    assert (issued() > 0) is by_loop


async def test_a_loop_that_spins_through_a_long_copy_prepares_for_its_end(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The copy thread stays awake, tells how far a copy should be, and leaves the copies to the loop.
    monkeypatch.setenv("AIOCOMM_GPU_SPIN_S", "2ms")
    nbytes = 32 << 20
    data = random(nbytes)
    async with world(2, links=("shm", "cuda"), warmup=True) as (a, b):
        source, into = DeviceArray(nbytes).write(data), DeviceArray(nbytes, device=other_device())
        for _ in range(1000):  # not while the loop happens to sleep
            before = simulator.calls("cuStreamWriteValue32")
            await both(a.send(source, 1), b.recv(into, 0))
            if simulator.calls("cuStreamWriteValue32") - before > 1:
                break
        else:
            pytest.fail("one number is written behind each copy, and none besides")
        assert (into.numpy() == data).all()

"""GPU memory on a loop that spins (`aiocomm.run(spin=…)`): part of test_gpu.py, and who moves it then."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fakes.gpu import DeviceArray
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

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]


async def test_the_loop_issues_copies_itself(pair: Pair) -> None:  # noqa: F811
    a, b = pair
    sources = [DeviceArray(4096).write(random(4096, seed)) for seed in range(4)]
    into = [DeviceArray(4096, device=other_device()) for _ in sources]
    for turn in range(200):
        one = turn % len(sources)
        await both(a.send(sources[one], 1), b.recv(into[one], 0))
    for seed, array in enumerate(into):
        assert (array.numpy() == random(4096, seed)).all()
    counted = [comm.links["cuda"].statistics().device for comm in pair]
    issued = sum(count for found in counted for key, count in found.items() if key.endswith(".by_loop"))
    # What goes through host memory is left to the copy threads.
    assert (issued > 0) is ("tcp" not in a.links)

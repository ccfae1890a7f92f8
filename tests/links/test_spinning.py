"""Conformance on a loop that spins (`aiocomm.run(spin=…)`): part of test_messages.py and test_cancel.py."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from links.conftest import VARIANTS, Variant
from links.test_cancel import (  # noqa: F401
    test_a_deadline_under_way_is_the_peers_cancel,
    test_a_posted_receive,
    test_a_receive_that_has_moved_some_bytes,
    test_a_receive_under_way,
    test_a_receives_deadline,
    test_a_send_that_nobody_receives,
    test_a_send_under_way,
    test_cancelling_the_task,
    test_one_sided,
)
from links.test_messages import (  # noqa: F401
    test_a_message_arrives_whole,
    test_both_directions_at_once,
    test_messages_of_all_sizes_keep_their_order,
    test_random_traffic,
    test_send_nowait_takes_or_refuses,
    test_submissions_and_completions_are_iterators,
    test_thousands_in_flight,
    test_truncation_fails_that_transfer_on_both_sides,
    test_wildcards_take_the_oldest_that_fits,
)

from aiocomm._loop.spin import SpinSelector

SPIN_S = 50e-6
# Each link in its usual way.
PLAIN = [
    one
    for one in VARIANTS
    if isinstance(one, Variant) and one.name in ("shm", "tcp", "rdma", "rdma-simulated")
]

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("variant", PLAIN, ids=lambda one: str(one.name), indirect=True),
]


def spinning() -> asyncio.AbstractEventLoop:
    """The loop of `aiocomm.run`."""
    return asyncio.SelectorEventLoop(SpinSelector(SPIN_S))


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """The one loop."""
    return "asyncio", {"loop_factory": spinning}

"""A process at its limit of open files: what fails says so, gives all back, and can be tried again."""

from __future__ import annotations

import contextlib
import os
import resource
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from harness import LIMIT_S, until, world

import aiocomm
from aiocomm._control import host

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio


def is_open(number: int) -> bool:
    with contextlib.suppress(OSError):
        return os.fstat(number) is not None
    return False


@contextlib.contextmanager
def room_for(descriptors: int) -> Iterator[None]:
    """So many can be opened, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {number for number in map(int, os.listdir("/proc/self/fd")) if is_open(number)}
    limit = 0  # above the last number that may be had; those that are open may lie above it
    while descriptors or limit in used:
        descriptors -= limit not in used
        limit += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def count() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_connect_gives_all_back_and_says_what_to_do() -> None:
    failures = []
    async with aiocomm.connect():
        pass  # what is opened once for the process
    for room in range(20):
        before = count()
        try:
            with room_for(room):
                comm = await aiocomm.connect()
                await comm.aclose()
        except aiocomm.LinkError as error:
            failures.append(str(error))
        await until(lambda before=before: count() <= before)  # type: ignore[misc]
    assert 3 < len(failures) < 20
    assert all("raise the limit of open files" in failure for failure in failures)


async def passes(a: aiocomm.Communicator, b: aiocomm.Communicator, data: Any, tag: int) -> None:
    receiving = b.recv_array(0, tag=tag)
    try:
        await a.send(data, 1, tag=tag)
    except aiocomm.AiocommError:
        receiving.cancel()
        await until(receiving.done)
        raise
    assert (await receiving == data).all()


async def test_a_pair_that_could_not_greet_is_made_anew() -> None:
    failures = []
    data = np.arange(200_000.0)
    for room in range(14):
        async with world(2) as (a, b):
            with room_for(room):
                transfers = [a.send(data, 1, deadline=1.0), b.recv_array(0, deadline=1.0)]
                for transfer in transfers:
                    try:
                        await transfer
                    except aiocomm.AiocommError as error:
                        failures.append(error)
            assert [peer.alive for comm in (a, b) for peer in comm.peers] == [True, True], room
            with anyio.fail_after(LIMIT_S):
                try:
                    await passes(a, b, data, 1)
                except aiocomm.PeerLostError:  # it had joined the last attempt without room
                    await passes(a, b, data, 2)
    assert any("raise the limit of open files" in str(error) for error in failures)


def test_a_process_that_cannot_be_looked_at_is_not_taken_for_dead() -> None:
    """Its descriptor takes the last one there is, and when it has started remains to be read."""
    parent = os.getppid()
    started = host.start_time(parent)
    with room_for(1), pytest.raises(OSError, match="Too many open files"):
        host.open_pidfd(parent, started)
    with room_for(0):
        for what in (host.host_id, lambda: host.start_time(os.getpid())):
            with pytest.raises(OSError, match="Too many open files"):
                what()

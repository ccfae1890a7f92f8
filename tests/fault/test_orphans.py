"""Deaths on other hosts after the rendezvous is gone, of peers that nobody is connected with."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

import pytest
from fault.hosts import Hosts, hosts

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

HEARTBEAT_S = 0.3
LATE_S = 3.0  # a process may stand still for two thirds of that, and its call still comes in time
ANY_SOURCE = """
import asyncio, sys
import aiocomm

async def main(address, rank, size):
    comm = await aiocomm.connect(address, rank=rank, size=size, deadline=20)
    print("ready", flush=True)
    with_nobody = comm.recv(bytearray(1), aiocomm.ANY_SOURCE)
    try:
        await with_nobody
    except aiocomm.PeerLostError:
        assert not any(peer.alive for peer in comm.peers)
        print("ended", flush=True)

asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))
"""


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Hosts]:
    with hosts(3, tmp_path) as made:
        yield made


@contextlib.contextmanager
def world(
    three: Hosts, *program: str, heartbeat_s: float = HEARTBEAT_S
) -> Iterator[list[subprocess.Popen[str]]]:
    """A member on each host, and none connected with another."""
    address = f"tcp://{three.addresses[0]}:7200"
    processes = [
        three.start(k, *program, address, str(k), "3", AIOCOMM_HEARTBEAT_S=str(heartbeat_s)) for k in range(3)
    ]
    try:
        for process in processes:
            assert heard(process).startswith("ready")
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def until_they_watch_each_other(processes: list[subprocess.Popen[str]]) -> None:
    """And have noticed the death of rank 0. Either may come first, and each may have called the other."""
    for rank in (1, 2):
        said: set[str] = set()
        while len(said) < 2:
            said.add(heard(processes[rank])[:7])
            assert said <= {"lost 0 ", "watches"}


def loss_heard(process: subprocess.Popen[str]) -> str:
    while (said := heard(process)).startswith("watches"):
        pass
    return said


CONTROL_ONLY = ["-m", "aiocomm._control.testing"]


@pytest.mark.parametrize("listener", [1, 2])
def test_who_died_before_the_watch_began_is_lost(three: Hosts, listener: int) -> None:
    with world(three, *CONTROL_ONLY) as processes:
        for rank in {0, 1, 2} - {listener}:
            processes[rank].kill()
        assert heard(processes[listener]).startswith("lost 0 ")
        said = heard(processes[listener])
        assert said.startswith(f"lost {3 - listener} "), said
        assert "there is no rendezvous any more (Connection refused)" in said


@pytest.mark.parametrize("how", ["dies", "loses its cable", "freezes and dies"])
@pytest.mark.parametrize("listener", [1, 2])
def test_who_is_watched_is_lost_with_its_connection(three: Hosts, listener: int, how: str) -> None:
    other = 3 - listener
    with world(three, *CONTROL_ONLY) as processes:
        processes[0].kill()
        until_they_watch_each_other(processes)
        if how == "loses its cable":
            three.ip(other, "link", "set", "eth0", "down")
        elif how == "dies":
            processes[other].kill()
        else:
            processes[other].send_signal(signal.SIGSTOP)
            processes[other].kill()
        said = loss_heard(processes[listener])
        assert said.startswith(f"lost {other} "), said
        assert "did not answer for 0.9 s" in said if how == "loses its cable" else "died" in said, said


def test_a_firewall_that_lets_only_one_of_two_through_is_no_death(three: Hosts) -> None:
    with world(three, *CONTROL_ONLY, heartbeat_s=LATE_S) as processes:
        three.drop(2, f"ip saddr {three.addresses[1]}")  # the lower rank's call
        processes[0].kill()
        until_they_watch_each_other(processes)
        processes[2].kill()
        assert "died" in loss_heard(processes[1])


def test_who_leaves_is_not_lost(three: Hosts) -> None:
    with world(three, *CONTROL_ONLY) as processes:
        processes[0].kill()
        until_they_watch_each_other(processes)
        for rank in (2, 1):
            rest = processes[rank].communicate(timeout=30)[0].splitlines()
            assert [line for line in rest if not line.startswith("watches")] == []


def test_receives_from_any_source_end(three: Hosts) -> None:
    with world(three, "-c", ANY_SOURCE) as processes:
        processes[0].kill()
        processes[2].kill()
        assert heard(processes[1]) == "ended\n"

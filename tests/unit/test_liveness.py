"""Which process a descriptor is of, and what is made of those that cannot be watched."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from aiocomm._control import host, liveness
from aiocomm._control.liveness import ProcessWatch
from aiocomm._control.messages import PeerCard


def test_a_process_that_is_hidden_lives_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of other users are where /proc is mounted with hidepid=2."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        started = host.start_time(child.pid)
        monkeypatch.setattr(host, "start_time", lambda pid: 0)
        with pytest.raises(PermissionError, match="hidden"):
            host.open_pidfd(child.pid, started)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert host.open_pidfd(child.pid, started) is None


@pytest.mark.parametrize("pid", [2**31, 2**62])
def test_an_id_that_no_process_can_have_is_of_none(pid: int) -> None:
    assert host.open_pidfd(pid, 1) is None


def test_a_descriptor_that_the_loop_cannot_wait_for_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As past the system's limit of what a user may wait for; files can never be waited for."""
    monkeypatch.setattr(liveness, "open_pidfd", lambda *_: os.open(__file__, os.O_RDONLY))

    async def watch() -> None:
        watching = ProcessWatch(pytest.fail)
        card = PeerCard(1, 1, None, "here", host.host_id(), 1, host.pid_namespace(), 1, (), (), ())
        before = os.listdir("/proc/self/fd")
        watching.add(card)
        assert not watching.watches(card)
        assert os.listdir("/proc/self/fd") == before
        watching.close()

    asyncio.run(watch())

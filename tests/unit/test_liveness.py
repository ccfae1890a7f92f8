"""Which process a descriptor is of."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from aiocomm._control import host


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

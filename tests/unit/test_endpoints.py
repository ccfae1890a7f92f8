"""Where pair connections are accepted, in a process that cannot have all of the sockets at first."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any

import pytest

from aiocomm._control import endpoints
from aiocomm._control.address import TcpAddress
from aiocomm._control.endpoints import Endpoints
from aiocomm._control.testing import RecordingEngine
from aiocomm.config import Settings


def test_who_binds_again_after_a_failure_gets_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    bind, exhausted = endpoints.bind, True

    def bind_late(address: Any) -> Any:
        if exhausted and isinstance(address, TcpAddress):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return bind(address)

    monkeypatch.setattr(endpoints, "bind", bind_late)
    here = Endpoints(RecordingEngine(), Settings())
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Too many open files"):
        here.bind("127.0.0.1")
    assert os.listdir("/proc/self/fd") == before
    exhausted = False
    near, far = here.bind("127.0.0.1")
    assert near.startswith("unix://@")
    assert far.startswith("tcp://127.0.0.1:")
    asyncio.run(here.aclose())
    assert os.listdir("/proc/self/fd") == before

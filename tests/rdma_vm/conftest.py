"""What runs inside the guest is collected there only: outside, `test_rdma_vm.py` boots it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from aiocomm_native import _core

collect_ignore = [] if os.environ.get("AIOCOMM_RDMA_GUEST") else ["guest"]
if "rdma" not in _core.available_links():  # built without the headers of libibverbs
    collect_ignore += ["guest/test_link.py", "guest/test_link_wire.py"]

_TOLD = pytest.StashKey[dict[str, str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Last come the tests that take rails and devices away: the kernel does not always give them back."""
    items.sort(key=lambda item: item.path.match("rdma_vm/guest/test_link.py"))


@pytest.fixture
def record_guest(request: pytest.FixtureRequest) -> dict[str, str]:
    """What pytest's summary shall say of the guest."""
    return request.config.stash.setdefault(_TOLD, {})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Tell what went on inside, since it counts as one test."""
    told = config.stash.get(_TOLD, {})
    if told:
        terminalreporter.write_line(told["summary"])

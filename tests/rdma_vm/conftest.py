"""What runs inside the guest is collected there only: outside, `test_rdma_vm.py` boots it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from aiocomm_native import _core

if TYPE_CHECKING:
    import pytest

collect_ignore = [] if os.environ.get("AIOCOMM_RDMA_GUEST") else ["guest"]
if "rdma" not in _core.available_links():  # built without the headers of libibverbs
    collect_ignore += ["guest/test_link.py", "guest/test_link_wire.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Last come the tests that take rails and devices away: the kernel does not always give them back."""
    items.sort(key=lambda item: item.path.match("rdma_vm/guest/test_link.py"))

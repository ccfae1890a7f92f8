"""Simulated network adapters: the verbs library of tests/fakes/verbs/, and what a test may do to it.

Both ends of a pair live in one process, so worlds of one process talk over them. AIOCOMM_LIBIBVERBS names the
library; FAKE_VERBS_DEVICES says how many adapters there are (2), FAKE_VERBS_LACKS what one cannot do
("0:create_cq:12": device, call, errno). They prove logic, never speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fakes.compiled import shared_library

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

__all__ = ["HEADERS", "Adapters", "build"]

HEADERS: Final = Path("/usr/include/infiniband/verbs.h").exists()
"""Without them neither the link nor the simulated library is built."""


def build() -> Path:
    """Compile the library if it has changed."""
    return shared_library(Path(__file__).parent / "verbs", "libibverbs.so.1")


class Adapters:
    """The simulated adapters of this process, seen from a test."""

    def __init__(self) -> None:
        self._library = _load()

    @contextlib.contextmanager
    def _meanwhile(self, control: str, during: tuple[Any, ...], after: tuple[Any, ...]) -> Iterator[None]:
        """Call a control of the library before the block, and after it."""
        call = getattr(self._library, f"fake_verbs_{control}")
        call(*during)
        try:
            yield
        finally:
            call(*after)

    def paused(self, nbytes: int) -> AbstractContextManager[None]:
        """Registrations of that many bytes and more wait for the end of the block."""
        return self._meanwhile("pause", (ctypes.c_size_t(nbytes),), (ctypes.c_size_t(-1),))

    def go_on(self) -> None:
        """What waits goes on."""
        self._library.fake_verbs_pause(ctypes.c_size_t(-1))

    def keeping(self, nbytes: int) -> AbstractContextManager[None]:
        """Deregistrations of that many bytes and more wait for the end of the block."""
        return self._meanwhile("keep", (ctypes.c_size_t(nbytes),), (ctypes.c_size_t(-1),))

    def let_go(self) -> None:
        """What is kept is deregistered."""
        self._library.fake_verbs_keep(ctypes.c_size_t(-1))

    def refusing(self, nbytes: int, error: int) -> AbstractContextManager[None]:
        """Registrations of that many bytes and more fail with an errno."""
        return self._meanwhile("fail", (ctypes.c_size_t(nbytes), error), (ctypes.c_size_t(-1), 0))

    def breaking(self, thread: bytes) -> AbstractContextManager[None]:
        """Calls by threads of this name throw."""
        return self._meanwhile("break", (ctypes.c_char_p(thread),), (None,))

    def refusing_dma_bufs(self) -> AbstractContextManager[None]:
        """As soft-RoCE does."""
        return self._meanwhile("dma_buf", (0,), (1,))

    def holding(self, device: int) -> AbstractContextManager[None]:
        """Calls that connect queue pairs of that device wait for the end of the block."""
        return self._meanwhile("hold", (device,), (-1,))

    def unreachable(self, device: int, error: int) -> AbstractContextManager[None]:
        """Queue pairs of that device cannot be connected."""
        return self._meanwhile("unreach", (device, error), (device, 0))

    def lacking(self, device: int, call: str, error: int) -> AbstractContextManager[None]:
        """A call ("create_cq") fails for that device."""
        return self._meanwhile("lack", (device, call.encode(), error), (device, call.encode(), 0))

    def stalled(self) -> AbstractContextManager[None]:
        """Reads and writes that are posted are done at the end of the block."""
        return self._meanwhile("stall", (1,), (0,))

    def tell(self, device: int, event: int) -> None:
        """Whoever has the device open hears of that event (IBV_EVENT_*)."""
        self._library.fake_verbs_tell(device, event)

    @property
    def waiting(self) -> int:
        """Registrations that wait."""
        return int(self._library.fake_verbs_waiting())

    @property
    def connecting(self) -> int:
        """Queue pairs that wait to be connected."""
        return int(self._library.fake_verbs_connecting())

    @property
    def pairs(self) -> int:
        """Queue pairs that there are."""
        return int(self._library.fake_verbs_pair_count())

    @property
    def leaving(self) -> int:
        """Deregistrations that wait."""
        return int(self._library.fake_verbs_leaving())

    @property
    def requests(self) -> int:
        """Requests that have been posted so far, of whatever kind."""
        return int(self._library.fake_verbs_requests())

    def regions(self, nbytes: int) -> int:
        """Regions of that many bytes and more that are registered now, one per adapter."""
        return int(self._library.fake_verbs_regions(ctypes.c_size_t(nbytes)))


@functools.cache
def _load() -> ctypes.CDLL:
    return ctypes.CDLL(str(build()))

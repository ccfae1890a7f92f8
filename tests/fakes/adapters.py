"""Simulated network adapters: the verbs library of tests/fakes/verbs/, and what a test may do to it.

Both ends of a pair live in one process, so worlds of one process talk over them. AIOCOMM_LIBIBVERBS names the
library; FAKE_VERBS_DEVICES says how many adapters there are (2). They prove logic, never speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fakes.compiled import shared_library

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    def paused(self, nbytes: int) -> Iterator[None]:
        """Registrations of that many bytes and more wait for the end of the block."""
        self._library.fake_verbs_pause(ctypes.c_size_t(nbytes))
        try:
            yield
        finally:
            self.go_on()

    def go_on(self) -> None:
        """What waits goes on."""
        self._library.fake_verbs_pause(ctypes.c_size_t(-1))

    @contextlib.contextmanager
    def keeping(self, nbytes: int) -> Iterator[None]:
        """Deregistrations of that many bytes and more wait for the end of the block."""
        self._library.fake_verbs_keep(ctypes.c_size_t(nbytes))
        try:
            yield
        finally:
            self.let_go()

    def let_go(self) -> None:
        """What is kept is deregistered."""
        self._library.fake_verbs_keep(ctypes.c_size_t(-1))

    @contextlib.contextmanager
    def refusing(self, nbytes: int, error: int) -> Iterator[None]:
        """Registrations of that many bytes and more fail with an errno."""
        self._library.fake_verbs_fail(ctypes.c_size_t(nbytes), error)
        try:
            yield
        finally:
            self._library.fake_verbs_fail(ctypes.c_size_t(-1), 0)

    @contextlib.contextmanager
    def breaking(self, thread: bytes) -> Iterator[None]:
        """Calls by threads of this name throw."""
        self._library.fake_verbs_break(ctypes.c_char_p(thread))
        try:
            yield
        finally:
            self._library.fake_verbs_break(None)

    @contextlib.contextmanager
    def refusing_dma_bufs(self) -> Iterator[None]:
        """As soft-RoCE does."""
        self._library.fake_verbs_dma_buf(0)
        try:
            yield
        finally:
            self._library.fake_verbs_dma_buf(1)

    @contextlib.contextmanager
    def holding(self, device: int) -> Iterator[None]:
        """Calls that connect queue pairs of that device wait for the end of the block."""
        self._library.fake_verbs_hold(device)
        try:
            yield
        finally:
            self._library.fake_verbs_hold(-1)

    @contextlib.contextmanager
    def unreachable(self, device: int, error: int) -> Iterator[None]:
        """Queue pairs of that device cannot be connected."""
        self._library.fake_verbs_unreach(device, error)
        try:
            yield
        finally:
            self._library.fake_verbs_unreach(device, 0)

    @contextlib.contextmanager
    def lacking(self, device: int, call: str, error: int) -> Iterator[None]:
        """A call ("create_cq") fails for that device."""
        self._library.fake_verbs_lack(device, call.encode(), error)
        try:
            yield
        finally:
            self._library.fake_verbs_lack(device, call.encode(), 0)

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """Reads and writes that are posted are done at the end of the block."""
        self._library.fake_verbs_stall(1)
        try:
            yield
        finally:
            self._library.fake_verbs_stall(0)

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

"""Registered memory: regions of one's own, and handles to those of peers."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, Self

import anyio

from aiocomm._numbers import integer
from aiocomm.errors import (
    ClosedError,
    PeerLostError,
    StaleHandleError,
    UsageError,
    UsageTypeError,
)

if TYPE_CHECKING:
    from types import TracebackType

    from aiocomm._operations import Operations
    from aiocomm_native import Transfer

__all__ = ["Region", "RemoteRegion", "check_notification", "look_away", "whole_handle", "withdraw"]

# Version, owner's rank and generation, region, first byte, bytes, writable.
_HANDLE: Final = struct.Struct("<4sHIQQQQ?")
_MAGIC: Final = b"aioR"
_VERSION: Final = 1


class Region:
    """Memory of this process that peers may read and, if it is writable, write. Made by `comm.register`.

    `async with`, or `aclose()`: afterwards its handles are stale and the memory is the caller's again.
    """

    def __init__(self, comm: Operations, number: int, nbytes: int, writable: bool, keep: Any) -> None:
        self._comm = comm
        self._number = number
        self._keep = keep
        self._closed = False
        self._free = anyio.Event()
        self.nbytes = nbytes
        self.writable = writable

    @property
    def handle(self) -> bytes:
        """What a peer needs for `comm.remote`: owner, generation, bounds. Send it however you like."""
        if self._closed:
            raise ClosedError("the region was closed")
        comm = self._comm
        return _HANDLE.pack(
            _MAGIC, _VERSION, comm.rank, comm._generation, self._number, 0, self.nbytes, self.writable
        )

    async def aclose(self) -> None:
        """Refuse new accesses and wait for those under way. Idempotent.

        If it is cancelled, the region is closed all the same, but accesses may still be under way. If the
        communicator closes meanwhile, that ends the accesses, and this.
        """
        self._refuse()
        await self._free.wait()

    def _refuse(self) -> None:
        """Refuse new accesses."""
        if not self._closed:
            self._closed = True
            comm = self._comm
            if comm.closed or comm._engine.close_region(self._number):
                comm._regions.pop(self._number, None)
                self._freed()

    def _end(self) -> None:
        """The communicator has closed, and with it all accesses."""
        self._closed = True
        self._freed()

    def _freed(self) -> None:
        self._keep = None
        self._free.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "writable" if self.writable else "read-only"
        return f"<aiocomm.Region {self.nbytes} bytes {state}>"


class RemoteRegion:
    """A peer's region, or part of it: the target of `put` and the source of `get`.

    `remote[start:stop]` narrows it, in bytes.
    """

    __slots__ = ("_comm", "_generation", "_number", "_start", "nbytes", "rank", "writable")

    def __init__(
        self,
        comm: Operations,
        rank: int,
        generation: int,
        number: int,
        start: int,
        nbytes: int,
        writable: bool,
    ) -> None:
        self._comm = comm
        self._generation = generation
        self._number = number
        self._start = start
        self.rank = rank
        self.nbytes = nbytes
        self.writable = writable

    @classmethod
    def from_handle(cls, comm: Operations, handle: bytes) -> Self:
        """Parse and check a handle."""
        handle = whole_handle(handle)
        if len(handle) != _HANDLE.size or not handle.startswith(_MAGIC):
            raise UsageError("these bytes are not a region's handle: pass region.handle of the owner")
        _, version, rank, generation, number, start, nbytes, writable = _HANDLE.unpack(handle)
        if version != _VERSION:
            raise UsageError(
                f"the handle has version {version}, this library {_VERSION}: use one release everywhere"
            )
        remote = cls(comm, rank, generation, number, start, nbytes, writable)
        remote._check_fresh(comm)
        return remote

    def _check_fresh(self, comm: Operations) -> None:
        if comm is not self._comm:
            raise UsageError("the remote region belongs to another communicator")
        current = comm._generation_of(self.rank)
        if current is None:
            if self.rank < comm._ranks:
                raise PeerLostError(
                    f"the handle's owner, rank {self.rank}, is gone, since before this process joined",
                    self.rank,
                )
            raise UsageError(f"the handle's owner, rank {self.rank}, is not known in this world")
        if current != self._generation:
            raise StaleHandleError(
                f"the handle belongs to an earlier incarnation of rank {self.rank}: exchange regions anew",
                self.rank,
            )

    def __getitem__(self, key: slice) -> RemoteRegion:
        if not isinstance(key, slice) or key.step not in (None, 1):
            raise UsageError("a remote region is narrowed by a slice of bytes, remote[start:stop]")
        start = 0 if key.start is None else integer("start", key.start)
        stop = self.nbytes if key.stop is None else integer("stop", key.stop)
        if not 0 <= start <= stop <= self.nbytes:
            raise UsageError(f"bytes {start}:{stop} are outside the remote region of {self.nbytes}")
        return RemoteRegion(
            self._comm,
            self.rank,
            self._generation,
            self._number,
            self._start + start,
            stop - start,
            self.writable,
        )

    def __len__(self) -> int:
        return self.nbytes

    def __repr__(self) -> str:
        return f"<aiocomm.RemoteRegion rank={self.rank} {self.nbytes} bytes at {self._start}>"


def whole_handle(handle: Any) -> bytes:
    """A handle as it was made, whatever it came in: a buffer that was received into, or an array.

    Raises:
        UsageError: it is no memory.
    """
    try:
        return memoryview(handle).tobytes()
    except (TypeError, BufferError):
        raise UsageTypeError(
            f"{type(handle).__name__} is no handle: pass the bytes that its owner gave"
        ) from None


def check_notification(notify: bytes | None) -> None:
    """Refuse what cannot travel with a put."""
    if notify is not None and not isinstance(notify, bytes):
        raise UsageTypeError(f"notify takes bytes, not {type(notify).__name__}")
    if notify is not None and len(notify) > 4096:
        raise UsageError("notify takes at most 4,096 bytes")


def look_away(transfer: Transfer[Any]) -> None:
    """What is called at the end of a transfer of the runtime's own that nobody waits for."""
    if not transfer.cancelled():
        transfer.exception()


def withdraw(receive: Transfer[Any]) -> None:
    """Give up a receive of the runtime's own; a failure of its own is no news."""
    if not receive.cancel() and receive.done():
        look_away(receive)

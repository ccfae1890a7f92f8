# Written by hand: these are plain CPython types, of which nanobind knows the names only. A test compares the members.
from asyncio import Future
from collections.abc import Callable, Generator
from contextvars import Context
from types import GenericAlias
from typing import Any, Literal, NoReturn, TypeVar, final

from _typeshed import structseq

__all__ = ["Status", "Transfer"]

T = TypeVar("T", covariant=True)

@final
class Status(structseq[int], tuple[int, int, int]):
    """What a receive got: `Status(source, tag, nbytes)`, a named tuple."""

    @property
    def source(self) -> int:
        """Rank that sent the message."""

    @property
    def tag(self) -> int:
        """Tag of the message."""

    @property
    def nbytes(self) -> int:
        """Bytes that came; the buffer may be larger."""

@final
# asyncio takes it for a future, and has no other type for what it takes. It is no instance of that, and covariant, since
# nobody but its runtime sets it.
class Transfer(Future[T]):  # type: ignore[type-var]
    """An operation under way: submitted at the call, awaitable any number of times.

    Ends exactly once: done, failed or cancelled. Use it wherever asyncio takes a Future (`gather`, `wait`,
    `wait_for`, `shield`), and by plain `await` on trio.

    Cancelling a task that awaits it cancels it; the await ends only when nothing touches the buffer any more.
    """

    def __await__(self) -> Generator[Any, None, T]: ...
    def __iter__(self) -> Generator[Any, None, T]: ...
    def __next__(self) -> Any: ...
    def __del__(self) -> None: ...
    def __reduce__(self) -> NoReturn: ...
    @classmethod
    def __class_getitem__(cls, item: Any, /) -> GenericAlias: ...
    def result(self) -> T:
        """What awaiting returns.

        Raises:
            asyncio.InvalidStateError: it has not ended yet.
            asyncio.CancelledError: it was cancelled by this side (on trio: `TransferCancelled`).
            AiocommError: it failed.
        """

    def exception(self) -> BaseException | None:
        """The error that it ended with, or None.

        Raises:
            asyncio.InvalidStateError: it has not ended yet.
            asyncio.CancelledError: it was cancelled by this side (on trio: `TransferCancelled`).
        """

    def done(self) -> bool:
        """Whether it has ended in any way."""

    def cancelled(self) -> bool:
        """Whether it was cancelled by this side."""

    def cancel(self, msg: object = None) -> bool:
        """Cancel it, so that it ends as cancelled once nothing touches its buffer.

        False: it has ended, or all is done but giving back its memory, and its outcome stands.
        """

    def add_done_callback(
        self, callback: Callable[[Transfer[T]], object], *, context: Context | None = None
    ) -> None:
        """Call back with the transfer, on its loop, when it has ended."""

    def remove_done_callback(self, callback: Callable[[Transfer[T]], object], /) -> int:
        """Remove a callback; returns how often it had been added."""

    def get_loop(self) -> Any:
        """The event loop that it belongs to; None on trio."""

    @property
    def kind(self) -> Literal["send", "recv", "put", "get"]:
        """What it does."""

    @property
    def nbytes(self) -> int:
        """Bytes of the message; of a pending receive, of its buffer."""

    @property
    def tag(self) -> int:
        """The message's tag; of a pending receive, as asked for."""

    @property
    def peer(self) -> int:
        """The other rank; of a pending receive, as asked for."""

    @property
    def channel(self) -> str:
        """The channel's name; empty for the default one."""

    @property
    def status(self) -> Status | None:
        """`Status` of a receive that is done, else None."""

    @property
    def _asyncio_future_blocking(self) -> bool: ...
    @_asyncio_future_blocking.setter
    def _asyncio_future_blocking(self, blocking: bool) -> None: ...
    @property
    def _cancel_message(self) -> object: ...
    def _make_cancelled_error(self) -> BaseException: ...

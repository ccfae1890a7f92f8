"""The output of the command: where it cannot be written there is a sentence, or nothing, but no traceback."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import ReadableBuffer

__all__ = ["OutputLost", "guarded"]

_STREAMS: Final = {1: "stdout", 2: "stderr"}


class OutputLost(Exception):  # no OSError: those that commands expect are of their own files
    """Standard output or error cannot be written; the cause is the system's error."""

    def __init__(self, descriptor: int, error: OSError) -> None:
        super().__init__(f"cannot write to {_STREAMS[descriptor]}: {error.strerror}")
        self.__cause__ = error
        self._descriptor = descriptor

    @property
    def broken(self) -> bool:
        """Whether its reader has gone, as `head` does."""
        return isinstance(self.__cause__, BrokenPipeError)

    def give_up(self) -> None:
        """What follows, and what is buffered, goes to /dev/null."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._descriptor)
        os.close(null)


class _Raw(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputLost(self.fileno(), error) from error


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Have `sys.stdout` and `sys.stderr` raise `OutputLost`, at the end of the block at the latest.

    One that this process was started without is /dev/null: else a socket would take its number, and with it
    the output.
    """
    for name in ("stdin", *_STREAMS.values()):  # opened in this order, each takes its own number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_guard(stream, number) for stream, number in zip(before, _STREAMS, strict=True))
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except OutputLost as lost:
        lost.give_up()
        with contextlib.suppress(OutputLost):
            sys.stdout.flush()
        raise
    finally:
        sys.stdout, sys.stderr = before


def _guard(stream: TextIO, descriptor: int) -> TextIO:
    if type(stream) is not io.TextIOWrapper or stream.fileno() != descriptor:  # a test's, or a notebook's
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Raw(descriptor, "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )

"""`aiocomm run`: start the processes of one world on this host, and stand for them.

One thread and one selector: pipes of the children, their ends (pidfds), and signals. Rules:
1. A line of output is written whole, after its rank; stdout and stderr stay apart.
2. Signals are passed on to every child's process group; a third interruption kills.
3. The first child that fails decides the exit status; the others are asked to end, and killed after a while.
4. If this process is killed, so are its children.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Final

from aiocomm._process import die_with_parent, fresh_address, fresh_token
from aiocomm.config import child_environment, resolve_world
from aiocomm.errors import AiocommError, UsageError

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["add_arguments", "main"]

_FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PIECE: Final = 64 * 1024
_LONGEST_LINE: Final = 1 << 20
_DRAIN_S: Final = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-n", "--processes", type=int, default=2, metavar="N", help="processes to start (2)")
    parser.add_argument("--address", help="where they meet; default: a Unix socket of this host")
    parser.add_argument(
        "--size", type=int, help="processes of the whole world, if others are started elsewhere"
    )
    parser.add_argument(
        "--first-rank", type=int, default=0, metavar="R", help="rank of the first process (0)"
    )
    parser.add_argument("--links", help="links that may be used, by comma")
    parser.add_argument("--no-prefix", action="store_true", help="do not put the rank before each line")
    parser.add_argument(
        "--grace", type=float, default=5.0, metavar="S", help="seconds between asking and killing (5)"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module")
    parser.add_argument("--no-python", action="store_true", help="the program is no Python script")
    parser.add_argument("program", help="script, module or program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def main(args: argparse.Namespace) -> int:
    """Run the children; returns the exit status of the first that failed."""
    try:
        return _Launcher(args).run()
    except (AiocommError, OSError) as error:
        print(f"aiocomm run: {error}", file=sys.stderr)
        return 2


@dataclass(eq=False)
class _Child:
    """One process of the world."""

    rank: int
    process: subprocess.Popen[bytes]
    pidfd: int

    def signal(self, signum: int) -> None:
        """Signal the child's whole process group, while the child is there."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signum)

    def end(self) -> None:
        """Kill it if it still runs, and forget it."""
        self.signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.pidfd)


@dataclass(eq=False)
class _Output:
    """One pipe of a child, and the part of a line that has come so far."""

    source: IO[bytes]
    target: int
    prefix: bytes
    part: bytearray = field(default_factory=bytearray)

    def pump(self) -> bool:
        """Move what is there. False once the pipe has ended."""
        try:
            data = os.read(self.source.fileno(), _PIECE)
        except BlockingIOError:
            return True
        self.part += data
        if not data:
            self._emit(len(self.part))
            return False
        whole = self.part.rfind(b"\n") + 1
        if whole or len(self.part) >= _LONGEST_LINE:
            self._emit(whole or len(self.part))
        return True

    def _emit(self, nbytes: int) -> None:
        if not nbytes:
            return
        lines = bytes(self.part[:nbytes])
        del self.part[:nbytes]
        if not lines.endswith(b"\n"):
            lines += b"\n"
        if self.prefix:
            lines = b"".join(self.prefix + line + b"\n" for line in lines[:-1].split(b"\n"))
        view = memoryview(lines)
        while view:
            view = view[os.write(self.target, view) :]


class _Launcher:
    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        if args.processes < 1:
            raise UsageError(f"cannot start {args.processes} processes")
        size = args.size if args.size is not None else args.first_rank + args.processes
        if not 0 <= args.first_rank <= size - args.processes:
            raise UsageError(
                f"ranks {args.first_rank} to {args.first_rank + args.processes - 1} exceed size {size}"
            )
        if size > args.processes and not args.address:
            raise UsageError("processes on several hosts need --address tcp://host:port")
        self._size = size
        self._address = args.address or fresh_address()
        self._token = resolve_world(self._address).token or (None if args.address else fresh_token())
        self._children: list[_Child] = []
        self._selector = selectors.DefaultSelector()
        self._outputs = 0
        self._status = 0
        self._kill_at: float | None = None
        self._signals: list[int] = []
        self._interruptions = 0

    def run(self) -> int:
        with contextlib.ExitStack() as stack:
            stack.callback(self._selector.close)
            self._catch_signals(stack)
            for rank in range(self._args.first_rank, self._args.first_rank + self._args.processes):
                self._start(rank, stack)
            try:
                while any(child.process.returncode is None for child in self._children):
                    self._turn(self._pause())
                end = time.monotonic() + _DRAIN_S  # a grandchild may hold a pipe open for ever
                while self._outputs and (pause := end - time.monotonic()) > 0:
                    self._turn(pause)
            except BrokenPipeError:  # nobody reads our output any more
                self._status = self._status or 128 + signal.SIGPIPE
        return self._status

    def _start(self, rank: int, stack: contextlib.ExitStack) -> None:
        args, parent = self._args, os.getpid()
        command = [args.program, *args.arguments]
        if not args.no_python:
            command = [sys.executable, *(["-m"] if args.module else []), *command]
        variables = {
            "AIOCOMM_RANK": str(rank),
            "AIOCOMM_SIZE": str(self._size),
            "AIOCOMM_ADDRESS": self._address,
            "AIOCOMM_LOCAL_RANK": str(rank - args.first_rank),
        }
        if self._token is not None:
            variables["AIOCOMM_TOKEN"] = self._token
        if args.links:
            variables["AIOCOMM_LINKS"] = args.links
        # One thread runs here, so code between fork and exec is safe; the parent's death is that thread's.
        process = subprocess.Popen(
            command,
            env=child_environment(variables, {"PYTHONUNBUFFERED": "1"}),
            stdin=None if rank == 0 and not sys.stdin.isatty() else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            preexec_fn=lambda: die_with_parent(parent),
        )
        child = _Child(rank, process, os.pidfd_open(process.pid))
        stack.callback(child.end)
        self._children.append(child)
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        assert process.stdout is not None
        assert process.stderr is not None
        prefix = b"" if args.no_prefix else b"[%d] " % rank
        for pipe, target in ((process.stdout, 1), (process.stderr, 2)):
            stack.enter_context(pipe)
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, _Output(pipe, target, prefix))
            self._outputs += 1

    def _turn(self, pause: float | None) -> None:
        """Wait for something, and handle all that is there."""
        for key, _ in self._selector.select(pause):
            match key.data:
                case _Output():
                    if not key.data.pump():
                        self._selector.unregister(key.fileobj)
                        self._outputs -= 1
                case _Child():
                    self._selector.unregister(key.fileobj)
                    self._ended(key.data)
                case _:
                    with contextlib.suppress(BlockingIOError):
                        os.read(key.fd, 4096)
        signals, self._signals = self._signals, []
        for signum in signals:
            self._forward(signum)
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_at = None
            for child in self._children:
                child.signal(signal.SIGKILL)

    def _pause(self) -> float | None:
        return None if self._kill_at is None else max(0.0, self._kill_at - time.monotonic())

    def _ended(self, child: _Child) -> None:
        code = child.process.wait()
        if code == 0 or self._status:
            return
        self._status = code if code > 0 else 128 - code
        others = [other for other in self._children if other.process.returncode is None]
        what = f"exited with status {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
        also = "; stopping the others" if others else ""
        with contextlib.suppress(OSError):
            os.write(2, f"[aiocomm] rank {child.rank} {what}{also}\n".encode())
        for other in others:
            other.signal(signal.SIGTERM)
        self._kill_at = time.monotonic() + self._args.grace

    def _forward(self, signum: int) -> None:
        if signum in (signal.SIGINT, signal.SIGTERM):
            self._interruptions += 1
            if self._interruptions >= 3:
                signum = signal.SIGKILL
        for child in self._children:
            child.signal(signum)

    def _catch_signals(self, stack: contextlib.ExitStack) -> None:
        wake, alarm = socket.socketpair()
        stack.enter_context(wake)
        stack.enter_context(alarm)
        wake.setblocking(False)
        alarm.setblocking(False)
        self._selector.register(wake, selectors.EVENT_READ, None)
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(alarm.fileno()))

        def note(signum: int, frame: FrameType | None) -> None:
            self._signals.append(signum)

        for signum in _FORWARDED:
            stack.callback(signal.signal, signum, signal.signal(signum, note))

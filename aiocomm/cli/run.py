"""`aiocomm run`: start the processes of one world on this host, and stand for them.

One thread and one selector: pipes of the children, their ends (pidfds), our own output, and signals. Rules:
1. A line of output is written whole, after its rank; stdout and stderr stay apart. What is not read waits, up
   to `_BACKLOG` bytes; then the children wait, as at any full pipe. Signals and the children's ends do not.
2. Signals are passed on to every child's process group; a third interruption kills. Those that are ignored
   here from the start, as nohup has it, stay so, here and there.
3. The first child that fails decides the exit status; the others are asked to end, and killed after a while.
4. What the children have written is written before this process ends, however long its reader takes; but if
   one has failed it is given up after `--grace` without progress, after an interruption after `_DRAIN_S`.
5. If this process is killed, so are its children.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import selectors
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Final

from aiocomm._control.address import EnvAddress, parse
from aiocomm._process import die_with_parent, fresh_address, fresh_token
from aiocomm.cli._streams import OutputLost
from aiocomm.config import child_environment, resolve_world
from aiocomm.errors import AiocommError, UsageError
from aiocomm.link import check_links

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["add_arguments", "main"]

_FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PIECE: Final = 64 * 1024
_LONGEST_LINE: Final = 1 << 20
_LARGEST_PIPE: Final = 1 << 20
_BACKLOG: Final = 1 << 20
_DRAIN_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 3600.0  # poll() takes no longer ones than 24 days


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
    rest = parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    rest.required = False  # which argparse tells those otherwise who forget the program


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


class _Sink:
    """Our own stdout or stderr, written without waiting; what it does not take yet waits here.

    The open file may be shared with others, who would find a non-blocking one strange. Pipes and sockets that
    are ready take `PIPE_BUF` bytes at once; a terminal is opened anew, non-blocking.
    """

    def __init__(self, descriptor: int, stack: contextlib.ExitStack) -> None:
        self.number = self.descriptor = descriptor
        self.waiting = bytearray()
        self.written = 0
        self._piece = _PIECE if stat.S_ISREG(os.fstat(descriptor).st_mode) else select.PIPE_BUF
        if os.isatty(descriptor):
            with contextlib.suppress(OSError):
                self.descriptor = os.open(
                    os.ttyname(descriptor), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
                )
                stack.callback(os.close, self.descriptor)
        self._poll = select.poll()
        self._poll.register(self.descriptor, select.POLLOUT)

    @property
    def full(self) -> bool:
        """Whether nothing more should come before some of it has left."""
        return len(self.waiting) >= _BACKLOG

    def write(self) -> None:
        """Write while it can be done at once.

        Raises:
            OutputLost: it cannot be written.
        """
        try:
            while self.waiting and self._poll.poll(0):  # each time: stdout and stderr may be one pipe
                count = os.write(self.descriptor, self.waiting[: self._piece])
                self.written += count
                del self.waiting[:count]
        except BlockingIOError:
            return
        except OSError as error:
            raise OutputLost(self.number, error) from error


@dataclass(eq=False)
class _Output:
    """One pipe of a child, and the part of a line that has come so far."""

    source: IO[bytes]
    sink: _Sink
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

    def finish(self) -> None:
        """Move what is there, to the end of what was written so far."""
        for _ in range(_LARGEST_PIPE // _PIECE):
            if not self.pump():
                return
        self._emit(len(self.part))

    def _emit(self, nbytes: int) -> None:
        if not nbytes:
            return
        lines = bytes(self.part[:nbytes])
        del self.part[:nbytes]
        if not lines.endswith(b"\n"):
            lines += b"\n"
        if self.prefix:
            lines = b"".join(self.prefix + line + b"\n" for line in lines[:-1].split(b"\n"))
        self.sink.waiting += lines


class _Launcher:
    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        if args.processes < 1:
            raise UsageError(f"cannot start {args.processes} processes")
        if not args.grace >= 0:  # also catches NaN
            raise UsageError(f"--grace must not be negative, but is {args.grace:g}")
        if args.first_rank < 0:
            raise UsageError(f"--first-rank must not be negative, but is {args.first_rank}")
        size = args.size if args.size is not None else args.first_rank + args.processes
        if args.first_rank > size - args.processes:
            raise UsageError(
                f"ranks {args.first_rank} to {args.first_rank + args.processes - 1} exceed size {size}"
            )
        if size > args.processes and not args.address:
            raise UsageError("processes on several hosts need --address tcp://host:port")
        self._size = size
        self._address = args.address or fresh_address()
        if isinstance(parse(self._address), EnvAddress):  # what all ranks would stumble over is told once
            raise UsageError("env:// says where others listen, not where to listen")
        links = None if args.links is None else tuple(filter(None, map(str.strip, args.links.split(","))))
        world = resolve_world(self._address, links=links)
        check_links(world.links or ())
        self._token = world.token or (None if args.address else fresh_token())
        self._children: list[_Child] = []
        self._selector = selectors.PollSelector()  # files, too; epoll refuses those
        self._outputs: set[_Output] = set()
        self._sinks: dict[int, _Sink] = {}
        self._status = 0
        self._kill_at: float | None = None
        self._signals: list[int] = []
        self._interruptions = 0

    def run(self) -> int:
        with contextlib.ExitStack() as stack:
            stack.callback(self._selector.close)
            self._sinks = {descriptor: _Sink(descriptor, stack) for descriptor in (1, 2)}
            self._catch_signals(stack)
            for rank in range(self._args.first_rank, self._args.first_rank + self._args.processes):
                self._start(rank, stack)
            try:
                while any(child.process.returncode is None for child in self._children):
                    self._turn(self._pause())
                self._drain()
            except OutputLost as lost:
                if not lost.broken:
                    raise
                self._status = self._status or 128 + signal.SIGPIPE  # nobody reads our output any more
        return self._status

    def _drain(self) -> None:
        """Write what the children have left (rule 4)."""
        end = time.monotonic() + _DRAIN_S  # a grandchild may hold a pipe open for ever
        while self._outputs and (pause := end - time.monotonic()) > 0:
            self._turn(pause)
        for output in list(self._outputs):
            output.finish()
            self._forget(output)
        written, since = -1, time.monotonic()
        while any(sink.waiting for sink in self._sinks.values()):
            total = sum(sink.written for sink in self._sinks.values())
            if total != written:
                written, since = total, time.monotonic()
            patience = self._args.grace if self._status else math.inf
            if self._interruptions:
                patience = _DRAIN_S
            pause = since + patience - time.monotonic()
            if pause <= 0:
                break
            self._turn(min(_LONGEST_PAUSE_S, pause))

    def _forget(self, output: _Output) -> None:
        self._outputs.remove(output)
        if output.source in self._selector.get_map():
            self._selector.unregister(output.source)

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
            self._outputs.add(_Output(pipe, self._sinks[target], prefix))

    def _turn(self, pause: float | None) -> None:
        """Wait for something, and handle all that is there."""
        self._choose()
        for key, _ in self._selector.select(pause):
            match key.data:
                case _Output():
                    if not key.data.pump():
                        self._forget(key.data)
                case _Sink():
                    key.data.write()
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

    def _choose(self) -> None:
        """Look at pipes whose sink has room, and at sinks for which something waits."""
        for output in self._outputs:
            self._look(output.source, selectors.EVENT_READ, output, not output.sink.full)
        for sink in self._sinks.values():
            self._look(sink.descriptor, selectors.EVENT_WRITE, sink, bool(sink.waiting))

    def _look(self, file: IO[bytes] | int, events: int, data: _Output | _Sink, wanted: bool) -> None:
        if wanted != (file in self._selector.get_map()):
            if wanted:
                self._selector.register(file, events, data)
            else:
                self._selector.unregister(file)

    def _pause(self) -> float | None:
        if self._kill_at is None:
            return None
        return min(_LONGEST_PAUSE_S, max(0.0, self._kill_at - time.monotonic()))

    def _ended(self, child: _Child) -> None:
        code = child.process.wait()
        if code == 0 or self._status:
            return
        self._status = code if code > 0 else 128 - code
        others = [other for other in self._children if other.process.returncode is None]
        what = f"exited with status {code}" if code > 0 else f"was ended by {_name(-code)}"
        also = "; stopping the others" if others else ""
        self._sinks[2].waiting += f"[aiocomm] rank {child.rank} {what}{also}\n".encode()
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

        # Ignored, as whoever starts this may have it, it would leave no status of a child that has ended.
        stack.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))
        for signum in _FORWARDED:
            if signal.getsignal(signum) is signal.SIG_IGN:
                continue
            stack.callback(signal.signal, signum, signal.signal(signum, note))


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # those of real time have none, but for the first and the last
        return f"signal {signum}"

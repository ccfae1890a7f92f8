"""Suite `rdma`: the verbs link between two hosts' ports of one machine, beside perftest over the same ports.

Made for the virtual machine of `tests/rdma_vm`, whose ports `rxea0` and `rxeb0` are two hosts' ends of one
rail. Emulated speed says nothing about adapters; the ratio to perftest in one boot says what the link adds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import pair, work
from .model import Column, Rule, Subject, Suite
from .peers import ours
from .sizes import MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics, Options

PORTS = ("rxea0", "rxeb0")
_NAMES = {MIB: "1MiB", 16 * MIB: "16MiB"}
_MAX_WRITE_NBYTES = 8 * MIB  # of soft-RoCE: perftest's 16 MiB are 8 MiB twice


async def _rates(comm: Any, role: int, nbytes: int, count: int) -> Metrics:
    """Return MB/s of messages whose receives are posted, of puts and of gets; two are outstanding."""
    data, other = np.ones(nbytes, np.uint8), 1 - role
    region = comm.register(np.zeros(nbytes, np.uint8))
    remote = await comm.exchange(region, with_=other)
    found: Metrics = {}

    async def timed(name: str, start: Any) -> None:
        await comm.barrier()
        began = time.perf_counter()
        for _ in range(count // 2):
            await asyncio.gather(*(transfer for transfer in (start(), start()) if transfer is not None))
        found[f"{name}/{_NAMES[nbytes]}"] = count * nbytes / (time.perf_counter() - began) / 1e6
        await comm.barrier()

    into = [np.zeros(nbytes, np.uint8) for _ in range(2)]
    spare = list(into)

    def receive() -> Any:
        spare.append(spare.pop(0))
        return comm.recv(spare[-1], other)

    await timed("send", (lambda: comm.send(data, other)) if role == 0 else receive)
    await timed("put", (lambda: comm.put(data, remote)) if role == 0 else lambda: None)
    await timed("get", (lambda: comm.get(remote, into=spare[0])) if role == 0 else lambda: None)
    await region.aclose()
    return found


async def _half_round_trip(comm: Any, role: int, count: int) -> float:
    """Return µs of 8 B, median."""
    data, into, halves = np.zeros(8, np.uint8), np.zeros(8, np.uint8), []
    for _ in range(count):
        began = time.perf_counter()
        if role == 0:
            await comm.send(data, 1)
            await comm.recv(into, 1)
        else:
            await comm.recv(into, 0)
            await comm.send(data, 0)
        halves.append((time.perf_counter() - began) / 2)
    return sorted(halves)[count // 2] * 1e6


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Measure one of ours; rank 0 tells."""
    os.environ["AIOCOMM_RDMA_DEVICES"] = PORTS[role]

    async def main() -> Metrics:
        comm = await ours.connect(role, control, arguments["link"])
        found: Metrics = {"half_us/8B": await _half_round_trip(comm, role, arguments["pings"])}
        for nbytes in _NAMES:
            found |= await _rates(comm, role, nbytes, max(4, arguments["nbytes"] // nbytes))
        await ours.Ours(comm).finish(control)
        return found

    return work.run_on("uvloop", main)


def _perftest(tool: str, nbytes: int, count: int) -> str:
    """Run both ends of one perftest; return the line of its result."""
    shared = ["-x", "1", "-F", "-s", str(nbytes), "-n", str(count)]
    with subprocess.Popen(
        [tool, "-d", PORTS[1], *shared], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if "Waiting for client" in line:
                    break
            done = subprocess.run(
                [tool, "-d", PORTS[0], *shared, "127.0.0.1"],
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            )
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(5)
            server.kill()
    found = re.search(r"^ *#bytes.*\n(.*)$", done.stdout, re.MULTILINE)
    if not found:
        raise RuntimeError(f"{tool}: no result in\n{done.stdout}")
    return found[1]


def _by_perftest(nbytes: int) -> Metrics:
    found: Metrics = {"half_us/8B": float(_perftest("ib_send_lat", 8, 500).split()[4])}
    found["write_lat_us/8B"] = float(_perftest("ib_write_lat", 8, 1000).split()[4])
    for size, name in _NAMES.items():
        each = min(size, _MAX_WRITE_NBYTES)
        write = float(_perftest("ib_write_bw", each, max(4, nbytes // each)).split()[3]) * MIB / 1e6
        found[f"send/{name}"] = found[f"put/{name}"] = write
        found[f"get/{name}"] = (
            float(_perftest("ib_read_bw", each, max(4, nbytes // each)).split()[3]) * MIB / 1e6
        )
    return found


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    nbytes = 32 * MIB if options.quick else 128 * MIB
    if name == "perftest":
        return _by_perftest(nbytes)
    link = name.removeprefix("aiocomm-")
    arguments = {"link": link, "nbytes": nbytes, "pings": 300 if options.quick else 1000}
    return pair.run(f"{__name__}:child", arguments, options.timeout_s)[0]


def _subjects(options: Options) -> list[Subject]:
    ports = all(Path("/sys/class/infiniband", port).exists() for port in PORTS)
    missing = "" if ports else f"no ports {' and '.join(PORTS)}: run it by tests/rdma_vm/run.py"
    tool = missing or ("" if shutil.which("ib_write_bw") else "apt install perftest")
    every = [
        Subject(
            "perftest", "floor", "rdma", tool, "ib_send_lat, ib_write_bw, ib_read_bw: polling, no Python"
        ),
        Subject("aiocomm-rdma", "ours", "rdma", missing),
        Subject("aiocomm-tcp", "ours", "tcp", missing),
    ]
    return [subject for subject in every if not options.peers or subject.name in options.peers]


_COLUMNS = (
    Column("half_us/8B", "8 B half\nround trip, µs", 1),
    *(
        Column(f"{way}/{size}", f"{way} {size},\nMB/s", 1, "higher")
        for size in _NAMES.values()
        for way in ("send", "put", "get")
    ),
)

SUITE = Suite(
    "rdma",
    "the verbs link beside perftest, over the two ports of one emulated rail",
    _subjects,
    measure,
    lambda options: _COLUMNS,
    (
        *(
            Rule(f"{way} of {size} ÷ perftest", "aiocomm-rdma", f"{way}/{size}", ">=", 0.9, ("perftest",))
            for way in ("send", "put", "get")
            for size in _NAMES.values()
        ),
        Rule("8 B by await ÷ the same over tcp", "aiocomm-rdma", "half_us/8B", "<=", 1.0, ("aiocomm-tcp",)),
    ),
)

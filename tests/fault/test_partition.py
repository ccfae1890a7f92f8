"""Two hosts, made of network namespaces, and what happens when the cable between them is cut."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HEARTBEAT_S = 1.0  # a process may stand still for twice as long, and is not lost
NAMES = [f"aiocomm-{os.getpid()}-{side}" for side in "ab"]
DEVICES = [f"ac{os.getpid() % 10**6}{side}" for side in "ab"]
ADDRESSES = ["10.213.7.1", "10.213.7.2"]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and ip to make network namespaces")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            DEVICES[0],
            "netns",
            NAMES[0],
            "type",
            "veth",
            "peer",
            "name",
            DEVICES[1],
            "netns",
            NAMES[1],
        )
        for name, device, address in zip(NAMES, DEVICES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot make network namespaces: {error.stderr.decode().strip()}")
    else:
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


# Of the control plane, and of the pair's own connections, by the runtime's clock or the kernel's.
REASONS = [
    f"did not answer for {3 * HEARTBEAT_S:g} s",
    "cannot be reached any more",
    "no sign of life for",
    *(f"failed: {os.strerror(code)}" for code in (errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH)),
]
ADDRESS = f"tcp://{ADDRESSES[0]}:7000"
CONTROL_ONLY = ["-m", "aiocomm._control.testing", ADDRESS]
WITH_ENGINE = [
    "-c",
    """
import asyncio, sys
import numpy as np
import aiocomm

async def main(address, rank, size):
    # Leaving would wait for an answer of the other side: the test ends this process.
    comm = await aiocomm.connect(address, rank=rank, size=size, links=("tcp",), warmup=True)
    other, got = 1 - rank, np.zeros(1 << 20, "u1")
    await asyncio.gather(comm.send(np.full(1 << 20, rank, "u1"), other), comm.recv(got, other))
    assert (got == other).all()
    # One waits for what never comes, one for somebody who takes it: the connection is idle.
    waiting = [comm.recv(bytearray(1), other, tag=1), comm.send(bytes(1 << 20), other, tag=2)]
    print("ready", rank, flush=True)
    for transfer in waiting:
        try:
            await transfer
        except aiocomm.PeerLostError as error:
            assert error.peer == other
        else:
            raise AssertionError(transfer)
    [peer] = comm.peers
    assert not peer.alive
    print("lost", other, str(waiting[0].exception()), flush=True)
    await asyncio.Event().wait()

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
""",
    ADDRESS,
]


def member(rank: int, program: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", *program, str(rank), "2"]
    env = {**os.environ, "AIOCOMM_TOKEN": "secret", "AIOCOMM_HEARTBEAT_S": str(HEARTBEAT_S)}
    return subprocess.Popen(
        ["ip", "netns", "exec", NAMES[rank], *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize("cut", NAMES, ids=["a", "b"])
@pytest.mark.parametrize("program", [CONTROL_ONLY, WITH_ENGINE], ids=["control plane", "transfers"])
def test_a_cut_cable_is_noticed_on_both_sides(program: list[str], cut: str) -> None:
    processes = [member(rank, program) for rank in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready")
        # Taking down either end of the pair takes the carrier from both.
        ip("-n", cut, "link", "set", DEVICES[NAMES.index(cut)], "down")
        for rank, process in enumerate(processes):
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith(f"lost {1 - rank} "), said
            assert any(reason in said for reason in REASONS), said
    finally:
        for process in processes:
            process.kill()
            process.communicate()

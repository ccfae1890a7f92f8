"""The launchers that others bring, where they are installed: torchrun and Open MPI's mpirun start a world."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PATIENCE_S = 100.0
PROGRAM = """
import asyncio, pathlib
import aiocomm

async def main():
    async with aiocomm.connect(warmup=True) as comm:
        after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        sending = comm.send(str(comm.rank).encode(), after)
        said = bytes(await comm.recv_array(before)).decode()
        await sending
        pathlib.Path(f"said-{comm.rank}").write_text(f"of {comm.size} heard {said}")  # launchers mix lines

asyncio.run(main())
"""


def command(name: str) -> str:
    """A program beside this interpreter, or on the path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_a_world_is_found(launcher: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = {name: value for name, value in os.environ.items() if not name.startswith("AIOCOMM_")}
    if launcher == "torchrun":
        env["AIOCOMM_TOKEN"] = "t"  # the ranks meet over TCP
        arguments = [command("torchrun"), "--standalone", "--nproc-per-node", "2", str(program)]
    else:
        arguments = [command("mpirun"), "--oversubscribe", "-n", "2"]
        arguments += ["--allow-run-as-root"] if os.getuid() == 0 else []
        arguments += [sys.executable, str(program)]
    done = subprocess.run(
        arguments, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said == ["of 2 heard 1", "of 2 heard 0"]

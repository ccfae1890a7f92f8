"""A variable that is misspelt is told, once per host; what is somebody else's is left in peace."""

from __future__ import annotations

import logging
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

import aiocomm
from aiocomm._process import fresh_address
from aiocomm.config import Settings, unknown_variables

SOURCES = Path(aiocomm.__file__).parent
PROGRAM = """
import aiocomm

async def worker(comm):
    await comm.barrier()

async def main():
    async with aiocomm.spawn(worker, n=2) as comm:
        await comm.barrier()

if __name__ == "__main__":
    aiocomm.run(main())
"""
LAUNCHED = """
import aiocomm

async def main():
    async with aiocomm.connect() as comm:
        await comm.barrier()

aiocomm.run(main())
"""
TOLD = "unknown variable, which has no effect"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("AIOCOMM_TIMEOUT", "AIOCOMM_TIMEOUT_S"),
        ("AIOCOMM_LINK", "AIOCOMM_LINKS"),
        ("AIOCOMM_LOGLEVEL", "AIOCOMM_LOG_LEVEL"),
        ("AIOCOMM_RDMA_DEVICE", "AIOCOMM_RDMA_DEVICES"),
        ("AIOCOMM_TOKENFILE", "AIOCOMM_TOKEN_FILE"),
        ("AIOCOMM_LIBVERBS", "AIOCOMM_LIBIBVERBS"),
        ("AIOCOMM_RDMA_GUEST", None),  # of the tests
        ("AIOCOMM_FUZZ_SEED", None),
        ("AIOCOMM_SERVICE_HOST", None),  # as Kubernetes sets for a service of that name
        ("AIOCOMM_SERVICE_PORT", None),
        ("AIOCOMM_PORT_80_TCP", None),
    ],
)
def test_what_is_likely_to_be_meant(name: str, meant: str | None) -> None:
    assert unknown_variables({name: "1", "PATH": "/bin"}) == [(name, meant)]


def test_all_that_is_read_is_known() -> None:
    read = {row[0] for row in Settings.reference()}
    for path in SOURCES.rglob("*.py"):
        read |= set(re.findall(r"AIOCOMM_[A-Z_]*[A-Z]", path.read_text()))
    assert len(read) > 40
    assert unknown_variables(dict.fromkeys(read, "0")) == []


def test_one_that_is_empty_is_not_set() -> None:
    assert unknown_variables({"AIOCOMM_TIMEOUT": ""}) == []


@pytest.mark.anyio
async def test_a_process_tells_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AIOCOMM_TIMEOUTS_S", "3")
    monkeypatch.setenv("AIOCOMM_OF_ANOTHER_TOOL", "3")
    monkeypatch.setattr("aiocomm._log._told", set())
    with caplog.at_level(logging.INFO, "aiocomm"):
        for _ in range(2):
            await (await aiocomm.connect()).aclose()
    told = [(one.levelname, one.getMessage()) for one in caplog.records]
    another = [level for level, text in told if "AIOCOMM_OF_ANOTHER_TOOL" in text]
    misspelt = [
        level for level, text in told if "name='AIOCOMM_TIMEOUTS_S' meant='AIOCOMM_TIMEOUT_S'" in text
    ]
    assert (another, misspelt) == (["INFO"], ["WARNING"])


@pytest.mark.parametrize("launched", [[], ["-m", "aiocomm", "run", "-n", "2"]], ids=["spawn", "run"])
def test_the_first_process_of_a_host_tells_for_all(launched: list[str], tmp_path: Path) -> None:
    (program := tmp_path / "program.py").write_text(LAUNCHED if launched else PROGRAM)
    done = subprocess.run(
        [sys.executable, *launched, str(program)],
        env={**os.environ, "AIOCOMM_TIMEOUT": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.count(TOLD) == 1, done.stderr


def test_the_rendezvous_tells() -> None:
    command = [sys.executable, "-m", "aiocomm", "rendezvous", "--listen", fresh_address()]
    env = {**os.environ, "AIOCOMM_TLS_CERTS": "x"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline().startswith(b"listening at ")
            assert select.select([process.stderr], [], [], 0)[0], "it was told before"
            assert b"meant='AIOCOMM_TLS_CERT'" in process.stderr.readline()
        finally:
            process.kill()

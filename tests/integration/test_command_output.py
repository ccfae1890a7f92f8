"""The `aiocomm` command whose output is closed, full or no longer read, and Ctrl-C: no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aiocomm import cli
from aiocomm.cli import doctor

PATIENCE_S = 60.0
SAY = ("run", "-n", "1", "--no-python", "echo", "said")
COMMANDS = [("doctor",), ("doctor", "--json"), ("bench", "--list"), ("--help",), SAY]


def aiocomm(*arguments: str, shell: str = "", unbuffered: str = "") -> subprocess.CompletedProcess[bytes]:
    """The command, with what a shell does to its streams."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "aiocomm", *arguments],
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_output_that_is_full_is_told_in_a_sentence(command: tuple[str, ...], unbuffered: str) -> None:
    done = aiocomm(*command, shell=">/dev/full", unbuffered=unbuffered)
    assert done.stderr == b"aiocomm: cannot write to stdout: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_output_that_nobody_reads_ends_it_quietly(command: tuple[str, ...], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [sys.executable, "-m", "aiocomm", *command],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    ) as process:
        os.close(writer)
        assert process.communicate(timeout=PATIENCE_S)[1] == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("shell", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", [("doctor",), SAY], ids=" ".join)
def test_closed_streams_are_as_dev_null(command: tuple[str, ...], shell: str) -> None:
    done = aiocomm(*command, shell=shell)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_an_interruption_ends_a_command_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: object) -> int:
        print("some")
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr() == ("some\n", "")


def test_the_demo_ends_quietly_when_interrupted() -> None:
    """As in a terminal: the signal goes to the whole group, at a moment when the worker imports."""
    # What a shell runs in the background ignores interruptions, and these tests may be run so.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "aiocomm", "demo"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, process_group=0) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            time.sleep(0.01)  # nothing tells of this
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=PATIENCE_S)[1] == b""
    assert process.returncode == 130


def test_errors_of_files_are_no_errors_of_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(args: object) -> int:
        raise FileNotFoundError("some file")

    monkeypatch.setattr(doctor, "main", fails)
    with pytest.raises(FileNotFoundError, match="some file"):
        cli.main(["doctor"])


@pytest.mark.parametrize("wrong", [("doctor", "extra"), ("doctor", "--jsn"), ("demo", "--layer", "3", "x")])
def test_an_argument_too_many_is_told_with_the_usage_of_its_command(wrong: tuple[str, ...]) -> None:
    done = aiocomm(*wrong)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: aiocomm {wrong[0]} [-h]".encode())
    assert f"unrecognized arguments: {wrong[-1]}\n".encode() in done.stderr

"""`aiocomm run` and `aiocomm.spawn`: real processes, their output, their ends."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import held

from aiocomm import cli
from aiocomm._process import fresh_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE_S = 60.0


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """Writes a program; gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "program.py"
        path.write_text("import os, signal, sys\nrank = os.environ['AIOCOMM_RANK']\n" + textwrap.dedent(text))
        return str(path)

    return write


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "aiocomm", "run", *arguments]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=False, **options)


@contextlib.contextmanager
def running(*arguments: str, ignored: signal.Signals | None = None) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "aiocomm", "run", *arguments]

    def disposed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # else that of whoever runs the tests
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=disposed
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen[bytes], count: int) -> list[str]:
    """The next lines of output, sorted."""
    assert process.stdout is not None
    return sorted(process.stdout.readline().decode().rstrip("\n") for _ in range(count))


def ended(pidfds: list[int]) -> bool:
    """Wait until all of these processes have ended; close the descriptors."""
    try:
        return all(select.select([descriptor], [], [], PATIENCE_S)[0] for descriptor in pidfds)
    finally:
        for descriptor in pidfds:
            os.close(descriptor)


# Output


def test_lines_are_whole_and_carry_their_rank(script: Callable[[str], str]) -> None:
    program = script("""
        for number in range(300):
            for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
                stream.write(f"{name} {rank} {number} ")
                stream.write("x" * 200 + "\\n")
    """)
    done = run("-n", "3", program)
    assert done.returncode == 0
    for output, name in ((done.stdout, "out"), (done.stderr, "err")):
        found = [
            re.fullmatch(rf"\[(\d)\] {name} (\d) (\d+) x{{200}}", line)
            for line in output.decode().splitlines()
        ]
        assert all(match is not None and match[1] == match[2] for match in found)
        numbers = {(match[1], int(match[3])) for match in found if match}
        assert numbers == {(str(rank), number) for rank in range(3) for number in range(300)}
        # In order within a rank.
        assert [int(match[3]) for match in found if match and match[1] == "1"] == list(range(300))


def test_bytes_pass_as_they_are(script: Callable[[str], str]) -> None:
    program = script("""
        sys.stdout.buffer.write(b"\\xff\\x00\\r one\\n\\n" + b"y" * 3_000_000 + b"\\nno end of line")
    """)
    done = run("-n", "1", program)
    first, empty, *long, last = done.stdout.split(b"\n[0] ")
    assert first == b"[0] \xff\x00\r one"
    assert empty == b""
    assert b"".join(long) == b"y" * 3_000_000
    assert last == b"no end of line\n"


def test_without_prefix(script: Callable[[str], str]) -> None:
    done = run("-n", "2", "--no-prefix", script("print('rank', rank)"))
    assert sorted(done.stdout.splitlines()) == [b"rank 0", b"rank 1"]
    assert done.stderr == b""


def test_output_that_nobody_reads_ends_the_run(script: Callable[[str], str]) -> None:
    with running("-n", "2", script("while True: print('x' * 100)")) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE_S) == 128 + signal.SIGPIPE


def full(process: subprocess.Popen[bytes]) -> None:
    """Wait until no more fits into the pipe that is not read."""
    assert process.stdout is not None
    writer = os.open(f"/proc/self/fd/{process.stdout.fileno()}", os.O_WRONLY)
    wait_unwritable(writer)
    os.close(writer)


def wait_unwritable(descriptor: int) -> None:
    while select.select([], [descriptor], [], 0)[1]:
        time.sleep(0.01)  # nothing tells of this


ENDLESS = """
    import threading
    signals = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # else one may come just before a write that waits
    def note():
        while True:
            os.write(2, f"{os.getpid()}\\n".encode())
            signal.sigwait(signals)
    threading.Thread(target=note).start()
    while True:
        print("x" * 100)
"""


def test_signals_are_heard_while_nobody_reads(script: Callable[[str], str]) -> None:
    with running("-n", "2", script(ENDLESS)) as process:
        assert process.stderr is not None
        both = {process.stderr.readline() for _ in range(2)}
        full(process)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            assert {process.stderr.readline() for _ in range(2)} == both
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGKILL


def test_a_failing_rank_is_noticed_while_nobody_reads(script: Callable[[str], str]) -> None:
    with running("-n", "2", "--grace", "0.5", script(ENDLESS)) as process:
        assert process.stderr is not None
        pids = dict(process.stderr.readline().split() for _ in range(2))
        full(process)
        os.kill(int(pids[b"[1]"]), signal.SIGSEGV)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGSEGV
        assert b"rank 1 was ended by SIGSEGV" in process.stderr.read()


def test_a_slow_reader_gets_everything(script: Callable[[str], str]) -> None:
    program = script("print('x' * 400_000); print('end')")
    with running("-n", "2", program) as process:
        full(process)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)  # longer than it looks for what a child's children write
        assert process.stdout is not None
        assert len(process.stdout.read()) == 2 * (400_000 + len("[0] \n[0] end\n"))
        assert process.wait(PATIENCE_S) == 0


def test_a_terminal_that_is_not_read_holds_nothing_up(script: Callable[[str], str]) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "aiocomm", "run", "-n", "1", script("while True: print('x' * 100)")]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL) as process:
        assert os.read(ours, 4) == b"[0] "
        wait_unwritable(theirs)
        assert os.get_blocking(theirs)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    os.close(ours)
    os.close(theirs)


# What the processes are told


def test_the_world_is_in_the_environment(script: Callable[[str], str]) -> None:
    program = script("""
        names = ("AIOCOMM_RANK", "AIOCOMM_SIZE", "AIOCOMM_ADDRESS", "AIOCOMM_LINKS")
        print(*[os.environ[name] for name in names], *sys.argv[1:])
        # The token is in no command line: those are for everyone to see.
        assert os.environ["AIOCOMM_TOKEN"] not in open(f"/proc/{os.getppid()}/cmdline").read()
        assert os.environ["AIOCOMM_TOKEN"] not in open("/proc/self/cmdline").read()
    """)
    done = run("-n", "2", "--links", "tcp", program, "--option", "-n", "value")
    assert done.returncode == 0, done.stderr
    rows = [line.split()[1:] for line in sorted(done.stdout.decode().splitlines())]
    assert [row[0] for row in rows] == ["0", "1"]
    assert rows[0][1:] == rows[1][1:]
    assert rows[0][1] == "2"
    assert rows[0][2].startswith("unix://@aiocomm-")
    assert rows[0][3:] == ["tcp", "--option", "-n", "value"]


def test_a_part_of_a_world_that_spans_hosts(script: Callable[[str], str]) -> None:
    env = {**os.environ, "AIOCOMM_TOKEN": "t"}
    program = script("print(rank, os.environ['AIOCOMM_SIZE'], os.environ['AIOCOMM_TOKEN'])")
    done = run(
        "-n",
        "2",
        "--size",
        "4",
        "--first-rank",
        "2",
        "--address",
        "tcp://h:1",
        "--no-prefix",
        program,
        env=env,
    )
    assert sorted(done.stdout.splitlines()) == [b"2 4 t", b"3 4 t"]


def test_modules_and_other_programs(tmp_path: Path) -> None:
    (tmp_path / "some_module.py").write_text("import sys; print('module', *sys.argv[1:])")
    done = run(
        "-n",
        "1",
        "-m",
        "some_module",
        "a",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": ""},
    )
    assert done.stdout == b"[0] module a\n"
    done = run("-n", "2", "--no-python", "sh", "-c", "echo $AIOCOMM_RANK")
    assert sorted(done.stdout.splitlines()) == [b"[0] 0", b"[1] 1"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-n", "0", "x.py"], "cannot start 0 processes"),
        (["-n", "2", "--size", "1", "x.py"], "exceed size 1"),
        (["-n", "2", "--size", "4", "x.py"], "need --address"),
        (["-n", "2", "--grace", "-1", "x.py"], "--grace must not be negative"),
        (["-n", "2", "--grace", "nan", "x.py"], "--grace must not be negative"),
        (["-n", "2", "--first-rank", "-1", "x.py"], "--first-rank must not be negative, but is -1"),
        (["-n", "2", "--links", "shm, smh", "x.py"], "unknown link 'smh': this build has "),
        (["-n", "2", "--address", "somewhere", "x.py"], "'somewhere' is no address; write tcp://host:port"),
        (["-n", "2", "--address", "tcp://h", "x.py"], "the address 'tcp://h' lacks a port"),
        (["-n", "2", "--address", "env://", "x.py"], "env:// says where others listen"),
        (["-n", "1", "--no-python", "/does/not/exist"], "No such file"),
    ],
)
def test_mistakes(arguments: list[str], complaint: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


# How it ends


def test_the_failing_rank_decides_and_the_others_end(script: Callable[[str], str]) -> None:
    program = script("""
        if rank == "1":
            sys.exit(7)
        signal.pause()
    """)
    done = run("-n", "3", program)
    assert done.returncode == 7
    assert b"[aiocomm] rank 1 exited with status 7; stopping the others\n" in done.stderr


def test_a_failing_rank_is_noticed_also_where_ends_of_children_are_ignored(
    script: Callable[[str], str],
) -> None:
    program = script("sys.exit(7) if rank == '1' else signal.pause()")
    with running("-n", "2", program, ignored=signal.SIGCHLD) as process:
        assert process.wait(PATIENCE_S) == 7


def test_those_who_do_not_listen_are_killed(script: Callable[[str], str]) -> None:
    program = script("""
        if rank == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("deaf", flush=True)
            while True:
                signal.pause()
        sys.exit(5)
    """)
    assert run("-n", "2", "--grace", "0.2", program).returncode == 5


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, 35])
def test_a_signal_is_reported_as_shells_do(signum: int, script: Callable[[str], str]) -> None:
    done = run("-n", "2", script(f"os.kill(os.getpid(), {int(signum)}) if rank == '1' else signal.pause()"))
    assert done.returncode == 128 + signum
    name = {35: "signal 35"}.get(signum) or signal.Signals(signum).name
    assert f"rank 1 was ended by {name}".encode() in done.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on(signum: signal.Signals, script: Callable[[str], str]) -> None:
    program = script(f"""
        signal.pthread_sigmask(signal.SIG_BLOCK, [{int(signum)}])  # else it may come just before the wait
        print("ready", flush=True)
        print("got", int(signal.sigwait([{int(signum)}])), flush=True)
    """)
    with running("-n", "2", program) as process:
        assert lines(process, 2) == ["[0] ready", "[1] ready"]
        process.send_signal(signum)
        assert lines(process, 2) == [f"[0] got {int(signum)}", f"[1] got {int(signum)}"]
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_signals_that_are_ignored_from_the_start_stay_so(
    signum: signal.Signals, script: Callable[[str], str]
) -> None:
    """As nohup has it, and a shell for what it runs in the background."""
    program = script("""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # else it may come just before the wait
        print("ready", flush=True)
        signal.sigwait([signal.SIGUSR1])
    """)
    with running("-n", "1", program, ignored=signum) as process:
        assert lines(process, 1) == ["[0] ready"]
        process.send_signal(signum)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(PATIENCE_S) == 0


def test_a_rendezvous_outlives_the_terminal_under_nohup() -> None:
    command = [sys.executable, "-m", "aiocomm", "rendezvous", "--listen", fresh_address()]
    for ignored in (False, True):
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            preexec_fn=lambda how=ignored: signal.signal(
                signal.SIGHUP, signal.SIG_IGN if how else signal.SIG_DFL
            ),
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"listening at ")
            status = Path(f"/proc/{process.pid}/status").read_text()
            mask = int(re.search(r"^SigIgn:\s*(\w+)$", status, re.MULTILINE)[1], 16)  # type: ignore[index]
            assert bool(mask & 1 << signal.SIGHUP - 1) == ignored
            process.terminate()
            assert process.wait(PATIENCE_S) == 0


def test_an_interruption_ends_programs_that_do_not_care(script: Callable[[str], str]) -> None:
    with running("-n", "2", script("print('ready', flush=True); signal.pause()")) as process:
        lines(process, 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM


def test_the_third_interruption_kills(script: Callable[[str], str]) -> None:
    program = script("""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # else it may come just before the wait
        print("ready", flush=True)
        while True:
            signal.sigwait([signal.SIGINT])
            print("no", flush=True)
    """)
    with running("-n", "1", program) as process:
        assert lines(process, 1) == ["[0] ready"]
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            assert lines(process, 1) == ["[0] no"]
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGKILL


def test_the_children_of_a_killed_launcher_end(script: Callable[[str], str]) -> None:
    program = script("""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(os.getpid(), flush=True)
        while True:
            signal.pause()
    """)
    with running("-n", "3", program) as process:
        pidfds = [os.pidfd_open(int(line.split()[1])) for line in lines(process, 3)]
        process.kill()
        assert ended(pidfds)


def test_nothing_is_left_of_a_group_that_is_killed(script: Callable[[str], str]) -> None:
    """The launcher and all ranks at once, in the middle of transfers over shared memory."""
    program = script("""
        import asyncio, aiocomm
        async def main():
            async with aiocomm.connect(links=("shm",), warmup=True) as comm:
                after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
                out, into = aiocomm.empty(8 << 20, "u1"), aiocomm.empty(8 << 20, "u1")
                turns = 0
                while True:
                    await asyncio.gather(comm.send(out, after), comm.recv(into, before))
                    turns += 1
                    if turns == 2:
                        print(os.getpid(), os.environ["AIOCOMM_ADDRESS"], flush=True)
        asyncio.run(main())
    """)
    before = held()
    with running("-n", "3", program) as process:
        rows = [line.split() for line in lines(process, 3)]
        pids = [process.pid, *(int(row[1]) for row in rows)]
        address = rows[0][2].removeprefix("unix://")
        assert address in Path("/proc/net/unix").read_text()
        pidfds = [os.pidfd_open(pid) for pid in pids]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert ended(pidfds)
    assert address not in Path("/proc/net/unix").read_text()
    assert living_with(address) == []
    after = held()
    assert all(after[what] <= before[what] for what in ("segments", "files")), (before, after)


def living_with(address: str) -> list[str]:
    """Processes in whose environment the world's address is: its ranks, and what they have started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ends meanwhile, or belongs to somebody else
            if address.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text())
    return found


def test_signals_reach_grandchildren(script: Callable[[str], str]) -> None:
    program = script("""
        import subprocess
        if rank == "0":
            code = "import signal; print('up', flush=True); signal.pause()"
            child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
            child.stdout.readline()
            print(child.pid, flush=True)
            signal.pause()
        print("ready", flush=True)
        signal.pause()
    """)
    with running("-n", "2", program) as process:
        pid = next(int(line.split()[1]) for line in lines(process, 2) if line.startswith("[0]"))
        pidfd = os.pidfd_open(pid)
        process.send_signal(signal.SIGTERM)
        assert ended([pidfd])


def test_a_world_under_the_launcher(script: Callable[[str], str]) -> None:
    program = script("""
        import asyncio, aiocomm
        async def main():
            async with aiocomm.connect(warmup=True) as comm:
                print(comm.rank, comm.size, len(comm.peers))
                await comm.barrier()  # one that has left can no longer be connected with
        asyncio.run(main())
    """)
    done = run("-n", "3", program)
    assert done.returncode == 0, done.stderr.decode()
    assert len(done.stdout.splitlines()) == 3
    assert {line.split()[2] for line in done.stdout.splitlines()} == {b"3"}


# The command


def test_the_command_knows_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended_with:
        cli.main(["--help"])
    assert ended_with.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("run", "demo", "doctor", "bench", "rendezvous"))
    with pytest.raises(SystemExit) as ended_with:
        cli.main(["nonsense"])
    assert ended_with.value.code == 2
    with pytest.raises(SystemExit):
        cli.main(["run", "-n", "2"])
    assert "required: program\n" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended_with:
        cli.main(["--version"])
    assert ended_with.value.code == 0


def test_a_rendezvous_over_tcp_needs_a_token() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("AIOCOMM_")}
    command = [sys.executable, "-m", "aiocomm", "rendezvous", "--listen", "tcp://127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=False, env=env)
    assert done.returncode == 2
    assert b"needs a token: set AIOCOMM_TOKEN_FILE" in done.stderr
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**env, "AIOCOMM_TOKEN": "t"}) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"listening at tcp://127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0

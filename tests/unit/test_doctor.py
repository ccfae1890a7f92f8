"""Discovery per link, what is said when something is refused, and the doctor's exit status."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from aiocomm import links
from aiocomm.cli import doctor
from aiocomm.links import Check, Report, State, cuda, rdma, shm, tcp
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.main(parser.parse_args(argv))


def checks(report: Report) -> dict[str, Check]:
    assert len({check.name for check in report.checks}) == len(report.checks)
    return {check.name: check for check in report.checks}


def refuse(code: int) -> Any:
    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def test_every_module_is_a_link_and_reports() -> None:
    assert set(links.names()) >= {"cuda", "rdma", "shm", "tcp"}
    for name in links.names():
        report = links.discover(name)
        assert report.link == name
        assert report.summary
        assert report.checks
    with pytest.raises(ValueError, match="no link called 'pigeon'"):
        links.discover("pigeon")


def test_usable_needs_a_built_link_and_no_failed_check() -> None:
    good, bad = Check("a", State.LIMITED, ""), Check("b", State.FAILED, "")
    assert Report("x", True, "", (good,)).usable
    assert not Report("x", True, "", (good, bad)).usable
    assert not Report("x", False, "", (good,)).usable


def test_shm_tries_the_real_thing() -> None:
    found = checks(shm.discover())
    for name in ("memfd", "descriptor passing", "eventfd"):
        assert found[name].state is State.OK, found[name]
    assert found["cross-memory attach"].state in (State.OK, State.LIMITED)


def _descriptors() -> set[tuple[str, str]]:
    """Each with what it stands for: somebody else may close one, and its number be used again."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listed folder's own
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def test_shm_leaves_no_descriptor_behind() -> None:
    before = _descriptors()
    shm.discover()
    assert _descriptors() <= before


@pytest.mark.parametrize(("call", "name"), [("memfd_create", "memfd"), ("eventfd", "eventfd")])
def test_shm_without_a_system_call_does_not_work(
    monkeypatch: pytest.MonkeyPatch, call: str, name: str
) -> None:
    monkeypatch.setattr(os, call, refuse(errno.ENOSYS))
    report = shm.discover()
    check = checks(report)[name]
    assert check.state is State.FAILED
    assert "not implemented" in check.detail
    assert check.advice
    assert not report.usable


def test_shm_without_pidfd_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pidfd_open", refuse(errno.EPERM))
    report = shm.discover()
    assert checks(report)["pidfd"].state is State.LIMITED
    assert report.usable


@pytest.mark.parametrize(
    ("scope", "seccomp", "advice"),
    [("1", "0", "ptrace_scope is 1"), ("0", "2", "SYS_PTRACE"), ("0", "0", "security modules")],
)
def test_refused_cross_memory_attach_is_explained(
    monkeypatch: pytest.MonkeyPatch, scope: str, seccomp: str, advice: str
) -> None:
    monkeypatch.setattr(shm, "_read_sibling", lambda pid, address: errno.EPERM)
    answers = {"/proc/sys/kernel/yama/ptrace_scope": scope, "/proc/self/status": f"Seccomp:\t{seccomp}\n"}
    monkeypatch.setattr(shm, "read_text", answers.get)
    report = shm.discover()
    check = checks(report)["cross-memory attach"]
    assert check.state is State.LIMITED
    assert advice in check.advice
    assert "bounce ring" in check.detail
    assert report.usable
    assert "copied twice" in report.summary


def test_a_child_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    report = shm.discover()
    check = checks(report)["cross-memory attach"]
    assert check.state is State.LIMITED
    assert "did not answer within 60 s" in check.detail
    assert report.usable


@pytest.mark.parametrize("link", ["shm", "tcp", "cuda", "rdma"])
def test_built_is_what_the_native_module_says(monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    assert links.discover(link).built == (link in _core.available_links())
    monkeypatch.setattr(_core, "available_links", list)
    report = links.discover(link)
    assert not report.built
    assert not report.usable


def test_a_build_without_the_rdma_link_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_core, "available_links", lambda: ["self", "shm", "tcp"])
    discover = rdma.discover
    check = discover().checks[0]
    assert (check.name, check.state) == ("this build", State.FAILED)
    assert "no rdma link" in check.detail
    assert "infiniband/verbs.h" in check.detail
    assert "libibverbs-dev" in check.advice
    monkeypatch.setattr(rdma, "discover", lambda: Report("rdma", False, "", (check,)))
    monkeypatch.setattr(links, "names", lambda: ("rdma",))
    assert run() == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "rdma not in this build" in told
    assert "apt install libibverbs-dev" in told
    monkeypatch.setattr(_core, "available_links", lambda: ["self", "rdma", "shm", "tcp"])
    assert "this build" not in checks(discover())


def test_tcp_connects_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "available_links", lambda: ["tcp"])
    report = tcp.discover()
    assert report.usable
    assert checks(report)["loopback"].state is State.OK


def test_tcp_without_loopback_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", refuse(errno.ENETUNREACH))
    report = tcp.discover()
    assert not report.usable
    assert "ip link set lo up" in checks(report)["loopback"].advice


def test_tcp_small_buffers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: str) -> str | None:
        return "4096 131072 212992" if "/ipv4/tcp_" in path else "212992" if "/core/" in path else None

    monkeypatch.setattr(tcp, "read_text", read)
    check = checks(tcp.discover())["socket buffers"]
    assert check.state is State.LIMITED
    assert "sysctl" in check.advice


@pytest.mark.parametrize(("module", "package"), [(rdma, "rdma")])
def test_later_links_are_honest(module: Any, package: str) -> None:
    report = module.discover()
    assert report.built == (module.__name__.rpartition(".")[2] in _core.available_links())
    assert not report.usable
    assert f"aiocomm[{package}]" in checks(report)["packages"].advice or not checks(report)["packages"].advice


def test_cuda_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", refuse(errno.ENOENT))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # which may be installed, and finds it by itself
    monkeypatch.setattr(cuda, "_on_bus", lambda: ["0000:01:00.0"])
    monkeypatch.setattr(cuda, "in_container", lambda: False)
    check = checks(cuda.discover())["driver library"]
    assert check.state is State.FAILED
    assert "install NVIDIA's driver" in check.advice


def fake(monkeypatch: pytest.MonkeyPatch, working: Sequence[str]) -> None:
    def look(name: str) -> Report:
        state = State.OK if name in working else State.FAILED
        return Report(
            name, name in ("shm", "tcp"), "summary", (Check("thing", state, "detail", "use [this]"),)
        )

    monkeypatch.setattr(links, "discover", look)


@pytest.mark.parametrize(
    ("working", "argv", "status"),
    [
        (["shm", "tcp"], [], 0),
        (["tcp"], [], 0),
        ([], [], 1),
        (["tcp"], ["--require", "tcp"], 0),
        (["tcp"], ["--require", "shm,tcp"], 1),
        (["shm", "tcp", "cuda"], ["--require", "cuda"], 1),
    ],
)
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    working: list[str],
    argv: list[str],
    status: int,
) -> None:
    fake(monkeypatch, working)
    assert run(*argv) == status
    text = capsys.readouterr().out
    assert "use [this]" in text
    assert ("not enough" in text) == bool(status)
    assert run("--json", *argv) == status
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is (status == 0)
    assert found["required"] == ([] if not argv else argv[1].split(","))
    assert [link["link"] for link in found["links"]] == ["shm", "tcp", "cuda", "rdma"]
    assert {link["link"]: link["usable"] for link in found["links"]}["cuda"] is False


@pytest.mark.parametrize(
    ("variable", "value", "error", "told"),
    [
        ("AIOCOMM_EAGER_MAX", "oops", True, "AIOCOMM_EAGER_MAX must be"),
        ("AIOCOMM_LINKS", "shm,pigeon", True, "unknown link 'pigeon'"),
        ("AIOCOMM_LINKS", "shm", False, ""),
        ("AIOCOMM_EAGER_MAXX", "1", False, "AIOCOMM_EAGER_MAXX means nothing: AIOCOMM_EAGER_MAX?"),
        ("AIOCOMM_ZEBRA", "1", False, "AIOCOMM_ZEBRA means nothing\n"),
    ],
)
def test_settings_that_connect_would_refuse_are_told(
    variable: str,
    value: str,
    error: bool,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake(monkeypatch, ["shm"])
    for name in [name for name in os.environ if name.startswith("AIOCOMM_")]:  # of whoever runs the tests
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, value)
    assert run() == int(error)
    text = capsys.readouterr().out
    assert told in text
    assert ("settings:" in text) == bool(told)
    assert "not enough" not in text
    assert run("--json") == int(error)
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is not error
    assert bool(found["settings"]["error"]) is error
    assert bool(found["settings"]["unknown"]) is (bool(told) and not error)


@pytest.mark.parametrize("asked", ["pigeon", "shm,pigeon", ","])
def test_unknown_links_are_a_usage_error(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--require", asked)
    assert ended.value.code == 2
    assert "not among cuda, rdma, shm, tcp" in capsys.readouterr().err


def test_another_host_s_report_is_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--json") in (0, 1)
    (there := tmp_path / "there.json").write_text(capsys.readouterr().out)
    asked: list[tuple[str, Any]] = []

    def compare(link: str, theirs: Any) -> list[Check]:
        asked.append((link, theirs))
        return [Check("peer of mine", State.OK, "gets on")] if link == "rdma" else []

    monkeypatch.setattr(links, "compare", compare)
    assert run("--against", str(there)) in (0, 1)
    assert "peer of mine" in capsys.readouterr().out
    assert dict(asked)["rdma"] == links.discover("rdma").facts
    assert run("--against", str(there), "--json") in (0, 1)
    found = {link["link"]: link["checks"] for link in json.loads(capsys.readouterr().out)["links"]}
    assert "peer of mine" in {check["name"] for check in found["rdma"]}
    assert "peer of mine" not in {check["name"] for check in found["shm"]}


def test_a_host_that_cannot_be_compared_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (there := tmp_path / "there.json").write_text(json.dumps({"links": [{"link": "rdma", "facts": {}}]}))

    def compare(link: str, theirs: Any) -> list[Check]:
        raise ValueError(f"of {link} it says [nothing]")

    monkeypatch.setattr(links, "compare", compare)
    assert run("--against", str(there)) in (0, 1)
    text = " ".join(capsys.readouterr().out.split())
    assert "nothing to compare with: of rdma it says [nothing]" in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"links": 3}',
        '{"links": [{"link": "rdma"}]}',
        '{"links": [{"link": "rdma", "facts": [3]}]}',
    ],
)
def test_another_host_s_report_must_be_one(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path := tmp_path / "there.json").write_text(text)
    with pytest.raises(SystemExit):
        run("--against", str(path))
    assert "doctor --json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--against", str(tmp_path / "nowhere.json"))
    assert "nowhere.json cannot be read: No such file or directory" in capsys.readouterr().err

"""What `aiocomm doctor` says of GPUs: the driver as it is, too old, empty, refusing, and asked both ways."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from fakes import simulated

from aiocomm.links import _container, _cuda_probe, cuda

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def simulated_library() -> None:
    """Asks for the library to be built before the tests begin (tests/conftest.py)."""


def doctor(**environment: str) -> dict[str, Any]:
    """The checks of the cuda link by name, from a process of its own."""
    library = simulated.build()
    done = subprocess.run(
        [sys.executable, "-m", "aiocomm", "doctor", "--json"],
        env={**os.environ, "AIOCOMM_LIBCUDA": str(library), "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr, done.stderr
    report = next(link for link in json.loads(done.stdout)["links"] if link["link"] == "cuda")
    return {check["name"]: check for check in report["checks"]} | {"summary": report["summary"]}


def test_devices_topology_and_sharing() -> None:
    found = doctor()
    assert found["summary"] == "the machine has 4 usable GPU(s)"
    assert "supports CUDA 13.0" in found["driver library"]["detail"]
    for index in range(4):
        check = found[f"device {index}"]
        assert check["state"] == "ok"
        assert f"Simulated GPU {index}, 4 GiB" in check["detail"]
        assert "GPU-73696d75-" in check["detail"]
    assert found["topology"]["detail"] == "all by NVLink"
    assert found["cudaMalloc memory"]["state"] == "ok"
    assert found["VMM memory"]["state"] == "ok"
    assert found["cudaMallocAsync memory"]["state"] == "info"
    assert "through the host" in found["cudaMallocAsync memory"]["detail"]


def test_visible_devices_are_honoured() -> None:
    found = doctor(CUDA_VISIBLE_DEVICES="2")
    assert found["summary"] == "the machine has 1 usable GPU(s)"
    assert "Simulated GPU 2" in found["device 0"]["detail"]
    assert "topology" not in found


@pytest.mark.parametrize(
    ("environment", "detail", "advice"),
    [
        ({"FAKE_CUDA_VERSION": "11040"}, "too old: supports CUDA 11.4", "driver 525 or newer"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_ERROR_NO_DEVICE (100)", "CUDA_VISIBLE_DEVICES"),
        ({"FAKE_CUDA_FAIL": "cuInit:1+:803"}, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)", "reboot"),
        ({"FAKE_CUDA_FAIL": "cuInit:1+:999"}, "CUDA_ERROR_UNKNOWN (999)", "modprobe"),
        ({"AIOCOMM_LIBCUDA": "libnothing.so.1"}, "libnothing.so.1 does not load", ""),
    ],
)
def test_no_usable_driver(environment: dict[str, str], detail: str, advice: str) -> None:
    found = doctor(**environment)
    check = found["driver library"]
    assert check["state"] == "failed"
    assert detail in check["detail"]
    assert advice in check["advice"]
    assert found["summary"] == "the machine has no usable GPU"


def test_refused_ipc_says_what_may_refuse_it() -> None:
    found = doctor(FAKE_CUDA_FAIL="cuIpcOpenMemHandle:1+:801")
    check = found["cudaMalloc memory"]
    assert check["state"] == "limited"
    assert "cuIpcOpenMemHandle gives CUDA_ERROR_NOT_SUPPORTED (801)" in check["detail"]
    assert check["advice"]
    assert found["VMM memory"]["state"] == "ok"


def test_what_lies_in_the_working_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "socket.py").write_text("raise SystemExit('not of this folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH")
    monkeypatch.setenv("AIOCOMM_LIBCUDA", str(simulated.build()))
    assert _cuda_probe.try_exports()[_cuda_probe.VMM] == "ok"


def test_a_device_that_cannot_be_used() -> None:
    found = doctor(FAKE_CUDA_LOST="0:46")
    check = found["memory of other processes"]
    assert check["state"] == "failed"
    assert "CUDA_ERROR_DEVICE_UNAVAILABLE (46)" in check["detail"]
    assert "nvidia-smi" in check["advice"]


def test_devices_without_peer_access() -> None:
    found = doctor(FAKE_CUDA_PEERS="0")
    check = found["topology"]
    assert check["state"] == "limited"
    assert "no peer access: 0-1, 0-2, 0-3, 1-2, 1-3, 2-3" in check["detail"]
    assert "topo" in check["advice"]


def test_cuda_python_tells_the_same() -> None:
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip("cuda-python is not installed")
    by_ctypes = doctor()
    by_bindings = doctor(AIOCOMM_LIBCUDA="", LD_LIBRARY_PATH=str(simulated.build().parent))
    assert "cuda-python" in by_bindings["driver library"]["detail"]
    for name in ("summary", "device 0", "device 3", "topology"):
        assert by_bindings[name] == by_ctypes[name]


@pytest.mark.parametrize(
    ("private", "container", "words"),
    [
        (["pid", "ipc"], True, "--pid=host --ipc=host"),
        (["pid"], True, "(pid): start it with --pid=host"),
        ([], True, "seccomp"),
        ([], False, "MIG"),
    ],
)
def test_what_refuses_is_named(
    monkeypatch: pytest.MonkeyPatch, private: list[str], container: bool, words: str
) -> None:
    monkeypatch.setattr(cuda, "private_namespaces", lambda: private)
    monkeypatch.setattr(cuda, "in_container", lambda: container)
    monkeypatch.setattr(cuda.os.path, "exists", lambda path: False)
    assert words in cuda._refused()


def test_containers_are_known_by_their_marks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_container, "_MARKS", (str(tmp_path / "mark"),))
    monkeypatch.setattr(_container, "read_text", lambda path: "0::/user.slice")
    assert not _container.in_container()
    (tmp_path / "mark").touch()
    assert _container.in_container()
    monkeypatch.setattr(_container, "_MARKS", ())
    monkeypatch.setattr(_container, "read_text", lambda path: "0::/kubepods/pod1")
    assert _container.in_container()


def test_without_a_driver_in_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "in_container", lambda: True)
    assert "--gpus all" in cuda._no_driver(True)
    monkeypatch.setattr(cuda, "in_container", lambda: False)
    assert "install NVIDIA's driver" in cuda._no_driver(True)
    assert cuda._no_driver(False) == ""


ASKS = """
import asyncio, sys
import aiocomm

async def nothing(comm):
    pass

async def main(how, links):
    try:
        if how == "spawn":
            async with aiocomm.spawn(nothing, 1, links=links):
                pass
        else:
            await (await aiocomm.connect(size=1, links=links)).aclose()
    except aiocomm.LinkError as error:
        print("refused:", error)
    else:
        print("joined")

asyncio.run(main(sys.argv[1], sys.argv[2].split(",") if sys.argv[2] else None))
"""


@pytest.mark.parametrize("how", ["connect", "spawn", "variable"])
@pytest.mark.parametrize("links", ["", "cuda", "shm,cuda"])
@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_link_to_gpus_that_is_asked_for_and_cannot_work_is_refused(
    how: str, links: str, has_gpu: bool
) -> None:
    env = os.environ | {"PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": "0" if has_gpu else ""}
    env.pop("AIOCOMM_LIBCUDA", None)
    if has_gpu:
        env["AIOCOMM_LIBCUDA"] = str(simulated.build())
    if how == "variable":
        env["AIOCOMM_LINKS"] = links
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ASKS, how, "" if how == "variable" else links],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr, done.stderr
    assert done.stdout.startswith("refused: " if links and not has_gpu else "joined"), done.stdout

"""`aiocomm demo` as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def demo(*argv: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "aiocomm", "demo", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_tables() -> None:
    done = demo("--layers", "2", "--tokens", "4", "--context", "700")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens equal: yes   keys and values equal: yes" in done.stdout
    for expected in ("time to first token", "hidden behind prefill", "GB/s", "beside bulk, urgent channel"):
        assert expected in done.stdout
    assert "using the first 700" in done.stderr


@pytest.mark.parametrize("link", ["shm", "tcp"])
def test_json_over_each_link(link: str) -> None:
    done = demo(
        "--layers", "3", "--tokens", "5", "--dim", "128", "--context", "900", "--link", link, "--json"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["link"] == link
    assert found["tokens_equal"]
    assert found["kv_equal"]
    assert len(found["tokens"]) == 5
    assert found["kv_bytes"] == 899 * 3 * 2 * 64 * 4
    assert 0 <= found["hidden_share"] < 1  # the last layer has nothing to hide behind
    assert found["split"]["time_to_first_token_s"] > found["split"]["prefill_s"]
    assert [latency["case"] for latency in found["latency"]] == ["idle", "urgent", "idle", "urgent", "same"]
    for latency in found["latency"]:  # a few pings may be back before any of the bulk
        rate = latency["bulk_bytes_per_s"]
        assert rate >= 0 if latency["case"] != "idle" else rate == 0


def test_own_prompt(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_bytes(bytes(range(256)))
    done = demo("--layers", "1", "--tokens", "1", "--dim", "128", "--prompt", str(prompt))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prompt of 256 bytes" in done.stdout


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--dim", "100"), "multiple of 128"),
        (("--prompt", "/nowhere/prompt"), "No such file"),
        (("--tokens", "0"), "argument --tokens: must be at least 1, not 0"),
        (("--tokens", "many"), "argument --tokens: must be a whole number, not 'many'"),
        (("--tokens", "99999999999"), "GB are free (see --tokens, --layers, --dim)"),
        (("--layers", "99999999"), "GB are free (see --tokens, --layers, --dim)"),
        (("--dim", "12800000"), "GB are free (see --tokens, --layers, --dim)"),
        (("--context", "1"), "argument --context: must be at least 2, not 1"),
        (("--seed", "-1"), "argument --seed: must be at least 0, not -1"),
        (("--link", "pigeon"), "--link"),
    ],
)
def test_bad_requests_exit_with_2(argv: tuple[str, ...], said: str) -> None:
    done = demo(*argv)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_of_one_byte_is_refused(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_bytes(b"x")
    done = demo("--prompt", str(prompt))
    assert done.returncode == 2
    assert "at least 2 bytes" in " ".join(done.stderr.split())

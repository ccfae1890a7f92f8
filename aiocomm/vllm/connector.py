"""What vLLM instantiates: one object in its scheduler, one in each worker."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

try:
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorTransferResults,
    )
    from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
    from vllm.v1.request import RequestStatus
except ImportError as error:
    raise ImportError(f"aiocomm.vllm needs vLLM 0.32 or newer, where it runs: {error}") from error

from aiocomm.errors import UsageError
from aiocomm.vllm.caches import Geometry
from aiocomm.vllm.metrics import PromMetrics, Stats
from aiocomm.vllm.ranks import Place
from aiocomm.vllm.scheduler import Scheduler
from aiocomm.vllm.steps import Figures, Step, request_of
from aiocomm.vllm.tensors import caches_of
from aiocomm.vllm.worker import Options, Worker

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["AiocommConnector"]


@dataclass
class _Metadata(KVConnectorMetadata):  # type: ignore[misc]
    step: Step = field(default_factory=Step)


def _dtype(stored: str, named: str) -> str:
    """What is stored in bytes has no dtype of its own, and two kinds of fp8 are stored so."""
    return named if stored == "torch.uint8" else stored.removeprefix("torch.")


def _backend(config: VllmConfig, names: Iterable[str]) -> str:
    """What computes attention; on CPUs the keys' order also depends on the instructions that it uses."""
    layers = config.compilation_config.static_forward_context
    found = {
        "/".join(filter(None, (layers[name].get_attn_backend().get_name(), getattr(layers[name], "isa", ""))))
        for name in names
        if name in layers
    }
    return ", ".join(sorted(found))


class AiocommConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """A decode engine gets a request's KV blocks from the prefill engine that computed them.

    Options are those of `aiocomm.vllm.worker.Options`, in `kv_connector_extra_config`. Requests carry
    `kv_transfer_params` as with vLLM's NixlConnector, so the same routers serve.
    """

    _scheduler: Scheduler  # in the scheduler only
    _worker: Worker  # in a worker only, as `_place`
    _place: Place

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = Options.of(self._kv_transfer_config.kv_connector_extra_config)
        engine = self._kv_transfer_config.engine_id
        parallel = vllm_config.parallel_config
        if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
            raise UsageError(
                "aiocomm.vllm does not move the KV caches of context-parallel engines: leave "
                "decode_context_parallel_size and prefill_context_parallel_size at 1"
            )
        ranks = parallel.tensor_parallel_size
        if role == KVConnectorRole.SCHEDULER:
            transfer = self._kv_transfer_config
            self._scheduler = Scheduler(
                engine,
                ranks,
                vllm_config.cache_config.block_size,
                fetches=transfer.is_kv_consumer,
                lends=transfer.is_kv_producer,
            )
        else:
            model = vllm_config.model_config
            heads = 1 if model.use_mla else model.get_total_num_kv_heads()
            stage, rank = get_pp_group().rank_in_group, get_tensor_model_parallel_rank()
            self._place = Place(engine, stage, rank, ranks, heads)
            self._worker = Worker(options, self._place)

    # In a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Join the other engines, and let them read these."""
        config = self._vllm_config
        tensors = list(kv_caches.values())
        caches, layers, content = caches_of(tensors, config.cache_config.block_size)
        geometry = Geometry(
            model=config.model_config.model,
            dtype=_dtype(str(tensors[0].dtype), str(config.cache_config.cache_dtype)),
            layers=layers,
            block_size=config.cache_config.block_size,
            heads=self._place.heads,
            content=content,
            stages=config.parallel_config.pipeline_parallel_size,
            layout=caches.layout,
            backend=_backend(config, kv_caches),
            vllm=vllm.__version__,
        )
        self._worker.join(caches, geometry)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Begin what the scheduler asked for; nothing of it is waited for."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, _Metadata)
        self._worker.begin(metadata.step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Requests run once all their blocks are here."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Blocks are read where they are."""

    def wait_for_save(self) -> None:
        """Blocks are read where they are."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What has ended since the last step."""
        sent, received, failed = self._worker.ended()
        return KVConnectorTransferResults(
            finished_sending=set(map(request_of, sent)), finished_recving=received, failed_recving=failed
        )

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What was handed over since the last step, for vLLM's log and Prometheus."""
        if self.role != KVConnectorRole.WORKER:
            return None
        figures = self._worker.figures()
        return None if figures == Figures() else Stats(asdict(figures))

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        """Figures of a worker, as they came to another process."""
        return Stats(data or asdict(Figures()))

    @classmethod
    def build_prom_metrics(cls, *arguments: Any, **keywords: Any) -> KVConnectorPromMetrics:
        """What Prometheus is shown."""
        return PromMetrics(*arguments, **keywords)

    def shutdown(self) -> None:
        """Leave the other engines."""
        if self.role == KVConnectorRole.WORKER:
            self._worker.close()

    # In the scheduler

    def on_new_request(self, request: Request) -> None:
        """Claim its blocks, if another engine has computed it."""
        self._scheduler.added(request.request_id, request.kv_transfer_params)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """All of the prompt that is not here comes from the engine that computed it."""
        count = self._scheduler.matched(request.request_id, request.num_prompt_tokens, num_computed_tokens)
        return count, count > 0

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Have the blocks fetched."""
        self._scheduler.allocated(
            request.request_id, request.num_prompt_tokens, blocks.get_block_ids()[0], num_external_tokens
        )

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers begin in this step."""
        return _Metadata(self._scheduler.step())

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Fetches that are over."""
        self._scheduler.received(connector_output.finished_recving or set())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Keep its blocks for the engine that goes on with it."""
        complete = request.status in (
            RequestStatus.FINISHED_LENGTH_CAPPED,
            RequestStatus.FINISHED_STOPPED,
        )
        params = self._scheduler.finished(
            request.request_id, request.kv_transfer_params, request.num_computed_tokens, block_ids, complete
        )
        return params is not None, params

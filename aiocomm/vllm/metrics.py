"""What vLLM logs of the blocks that were handed over, and shows Prometheus."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from aiocomm.vllm.steps import Figures

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["PromMetrics", "Stats"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_BYTES = tuple(float(1 << power) for power in range(14, 35, 2))


class Stats(KVConnectorStats):  # type: ignore[misc]
    """`Figures` of all workers of an engine, as a dict."""

    def reset(self) -> None:
        """Begin anew."""
        self.data = asdict(Figures())

    def aggregate(self, other: KVConnectorStats) -> Self:
        """Add another's."""
        for name, value in other.data.items():
            self.data[name] = self.data[name] + value
        return self

    def is_empty(self) -> bool:
        """Whether nothing was handed over, nor failed."""
        return Figures(**self.data) == Figures()

    def reduce(self) -> dict[str, int | float]:
        """What is logged of a while."""
        found = Figures(**self.data)
        told: dict[str, int | float] = {"Fetches": len(found.seconds)}
        if found.seconds:
            mean, total = statistics.fmean(found.seconds), sum(found.nbytes)
            told |= {
                "Mean ms": round(mean * 1e3, 3),
                "Longest ms": round(max(found.seconds) * 1e3, 3),
                "Mean MB": round(total / len(found.nbytes) / 1e6, 3),
                "MB/s": round(total / sum(found.seconds) / 1e6, 1),
            }
        return told | {"Failed": found.failed, "Unclaimed": found.unclaimed}


class PromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The same, cumulated."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def made(kind: Any, name: str, documentation: str, **how: Any) -> dict[int, Any]:
            metric = metric_types[kind](
                name=f"vllm:aiocomm_{name}", documentation=documentation, labelnames=labelnames, **how
            )
            made_for: dict[int, Any] = create_metric_per_engine(metric, per_engine_labelvalues)
            return made_for

        self._series = {
            "seconds": made(
                Histogram, "fetch_seconds", "How long a request's KV blocks took to come.", buckets=_SECONDS
            ),
            "nbytes": made(Histogram, "fetch_bytes", "Bytes of a request's KV blocks.", buckets=_BYTES),
        }
        self._counts = {
            "failed": made(Counter, "fetches_failed", "Requests whose KV blocks did not come."),
            "unclaimed": made(Counter, "leases_unclaimed", "Requests whose KV blocks nobody came for."),
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take in what a step has brought."""
        for name, series in self._series.items():
            for value in transfer_stats_data[name]:
                series[engine_idx].observe(value)
        for name, count in self._counts.items():
            count[engine_idx].inc(transfer_stats_data[name])

"""A communicator's statistics for Prometheus: `pip install 'aiocomm[metrics]'`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from aiocomm.communicator import Communicator
    from aiocomm.histogram import Histogram
    from aiocomm.statistics import LinkStatistics, Statistics

__all__ = ["Metrics"]

_COUNTERS: Final = {
    "submitted": "Operations submitted, once their link is known: receives with their messages.",
    "completed": "Operations that ended well.",
    "failed": "Operations that failed, and calls of send_nowait that were refused.",
    "cancelled": "Operations cancelled by this side.",
    "would_block": "Calls of send_nowait that were refused.",
    "fallbacks": "Times that a slower path or link was taken.",
    "violations": "Pairs closed for what their peers sent.",
    "frames_sent": "Frames sent.",
    "frames_received": "Frames received.",
    "bytes_sent": "Payload bytes sent.",
    "bytes_received": "Payload bytes received.",
}
_GAUGES: Final = {
    "peers": "Connected peers.",
    "queued": "Operations that wait in the scheduler.",
    "in_flight_bytes": "Bytes posted and not completed.",
    "window_bytes": "Bytes that may be in flight.",
    "rate_bytes_per_s": "Measured rate.",
}
_NO_NAME: Final = re.compile("[^a-zA-Z0-9]")
_HISTOGRAMS: Final = {
    "queued_s": "Seconds from submission until the first byte moved.",
    "moved_s": "Seconds from the first byte until the end.",
}


class Metrics(Collector):
    """Collects a communicator's counters, gauges and histograms when Prometheus asks for them.

    `REGISTRY.register(aiocomm.metrics.Metrics(comm))`; unregister it when the communicator is closed. Reading
    is safe from the thread that serves the metrics.

    A registry takes one of each `labels`, and raises `ValueError` for another: of two communicators of one
    process, often rank 0 of two worlds, it could not tell whose a sample is.

    Args:
        comm: whose statistics are collected.
        labels: further labels of every sample, e.g. `{"model": "llama"}`; `rank` is always there.
    """

    def __init__(self, comm: Communicator, labels: dict[str, str] | None = None) -> None:
        self._comm = comm
        self._labels = {"rank": str(comm.rank), **(labels or {})}

    def collect(self) -> Iterator[Metric]:
        """Take a snapshot; nothing once the communicator is closed."""
        if self._comm.closed:
            return
        statistics = self._comm.statistics()
        yield from self._links(list(statistics.links.values()))
        yield from self._matching(statistics)

    def describe(self) -> list[Metric]:
        """Registering reads nothing. By this name, which is no sample's, a registry knows who is alike."""
        labels = ",".join(f"{name}={value}" for name, value in self._labels.items())
        return [GaugeMetricFamily("aiocomm_of_" + _NO_NAME.sub(lambda c: f"_{ord(c[0]):x}_", labels), "")]

    def _links(self, links: list[LinkStatistics]) -> Iterator[Metric]:
        names, values = [*self._labels, "link"], list(self._labels.values())
        families: tuple[tuple[dict[str, str], Any], ...] = (
            (_COUNTERS, CounterMetricFamily),
            (_GAUGES, GaugeMetricFamily),
        )
        for texts, kind in families:
            for name, text in texts.items():
                family = kind(f"aiocomm_link_{name}", text, labels=names)
                for link in links:
                    family.add_metric([*values, link.link], getattr(link, name))
                yield family
        for by_path, text in (
            ("messages_by_path", "Messages completed, accesses of peers among them."),
            ("bytes_by_path", "Bytes of completed messages."),
        ):
            family = CounterMetricFamily(f"aiocomm_link_{by_path}", text, labels=[*names, "path"])
            for link in links:
                for path, count in getattr(link, by_path).items():
                    family.add_metric([*values, link.link, path], count)
            yield family
        for name, text in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(
                f"aiocomm_link_{name.removesuffix('_s')}_seconds", text, labels=names
            )
            for link in links:
                histogram.add_metric([*values, link.link], _buckets(getattr(link, name)), sum_value=None)
            yield histogram

    def _matching(self, statistics: Statistics) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        for name in ("in_flight", "posted_receives", "unexpected_messages", "unexpected_bytes"):
            gauge = GaugeMetricFamily(f"aiocomm_{name}", f"Now: {name.replace('_', ' ')}.", labels=names)
            gauge.add_metric(values, getattr(statistics, name))
            yield gauge
        calls = CounterMetricFamily(
            "aiocomm_collectives", "Collective calls completed.", labels=[*names, "operation", "algorithm"]
        )
        for key, count in statistics.collectives.items():
            operation, _, algorithm = key.partition("/")
            calls.add_metric([*values, operation, algorithm], count)
        yield calls


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    seen, buckets = 0, []
    for count, bound in zip(histogram.counts, histogram.bounds_s, strict=True):
        seen += count
        buckets.append(("+Inf" if bound == float("inf") else f"{bound:.9g}", float(seen)))
    return buckets

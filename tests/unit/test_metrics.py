"""Histograms of durations, and what Prometheus gets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import prometheus_client
import pytest

import aiocomm
from aiocomm import Histogram
from aiocomm.metrics import Metrics

if TYPE_CHECKING:
    from conftest import Pair


def test_percentiles_are_bounds_of_slots() -> None:
    histogram = Histogram.of([0, 1, 0, 8, 1])
    assert histogram.total == 10
    assert histogram.bounds_s == (1e-9, 2e-9, 4e-9, 8e-9, math.inf)
    assert histogram.percentile(0.0) == histogram.percentile(0.1) == 2e-9
    assert histogram.percentile(0.11) == histogram.percentile(0.9) == 8e-9
    assert histogram.percentile(1.0) == math.inf
    assert Histogram.of([0, 0]).percentile(0.5) == 0.0
    with pytest.raises(ValueError, match="fraction"):
        histogram.percentile(2)


def test_the_difference_is_what_came_since() -> None:
    assert Histogram.of([3, 5]) - Histogram.of([1, 5]) == Histogram.of([2, 0])


@pytest.mark.anyio
async def test_every_completed_operation_is_counted_once(pair: Pair) -> None:
    a, b = pair
    link = b.links["shm"]
    before = link.statistics()
    for nbytes in (8, 1 << 20):
        posted = b.recv(np.empty(nbytes, np.uint8), 0)
        await a.send(np.zeros(nbytes, np.uint8), 1)
        await posted
    after = link.statistics()
    assert after.completed - before.completed == 2
    for name in ("queued_s", "moved_s"):
        since = getattr(after, name) - getattr(before, name)
        assert since.total == 2
        assert 0 < since.percentile(1.0) < math.inf


@pytest.mark.anyio
async def test_prometheus_gets_all_of_it(pair: Pair) -> None:
    a, b = pair
    posted = b.recv_array(src=0)
    await a.send(np.zeros(1 << 20, np.uint8), 1)
    await posted
    registry = prometheus_client.CollectorRegistry()
    registry.register(Metrics(b, {"model": "tiny"}))
    labels = {"rank": "1", "model": "tiny"}
    shm = {**labels, "link": "shm"}
    assert registry.get_sample_value("aiocomm_link_completed_total", shm) == 1
    path = {**shm, "path": "cma"}
    by_path = b.links["shm"].statistics().bytes_by_path
    assert registry.get_sample_value("aiocomm_link_bytes_by_path_total", path) == by_path["cma"]
    assert registry.get_sample_value("aiocomm_link_moved_seconds_bucket", {**shm, "le": "+Inf"}) == 1
    assert registry.get_sample_value("aiocomm_unexpected_messages", labels) == 0
    text = prometheus_client.generate_latest(registry).decode()
    assert 'aiocomm_link_rate_bytes_per_s{link="shm",model="tiny",rank="1"}' in text
    await b.aclose()
    assert list(registry.collect()) == []


@pytest.mark.anyio
async def test_two_communicators_of_one_registry_differ_by_labels() -> None:
    registry = prometheus_client.CollectorRegistry()
    async with aiocomm.connect() as a, aiocomm.connect() as b:
        first = Metrics(a, {"model": "a-b"})
        registry.register(first)
        with pytest.raises(ValueError, match="Duplicated"):
            registry.register(Metrics(b, {"model": "a-b"}))
        for model in ("a_b", "a=b", "ä"):
            registry.register(Metrics(b, {"model": model}))
        lines = prometheus_client.generate_latest(registry).decode().splitlines()
        samples = [line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")]
        assert len(samples) == len(set(samples))
        registry.unregister(first)
        registry.register(Metrics(b, {"model": "a-b"}))

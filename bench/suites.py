"""The suites that the tool runs; a new one is a module and a line here."""

from . import (
    collectives,
    faults,
    gpu,
    gpu_collectives,
    gpu_compute,
    gpu_mixed,
    gpu_moe,
    gpu_ring,
    handoff,
    idle,
    moe,
    overhead,
    oversubscribe,
    pages,
    pairs,
    progress,
    qos,
    rdma,
    startup,
)
from .model import Suite

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        pairs.SUITE,
        qos.SUITE,
        progress.SUITE,
        overhead.SUITE,
        oversubscribe.SUITE,
        idle.SUITE,
        faults.SUITE,
        *collectives.SUITES,
        pages.SUITE,
        moe.SUITE,
        *handoff.SUITES,
        startup.SUITE,
        gpu.SUITE,
        gpu_collectives.SUITE,
        gpu_compute.SUITE,
        gpu_mixed.SUITE,
        gpu_ring.SUITE,
        gpu_moe.SUITE,
        rdma.SUITE,
    )
}

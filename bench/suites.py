"""The suites that the tool runs; a new one is a module and a line here."""

from . import (
    collectives,
    faults,
    gpu,
    gpu_compute,
    gpu_mixed,
    gpu_ring,
    idle,
    moe,
    overhead,
    oversubscribe,
    pairs,
    progress,
    qos,
    rdma,
    startup,
)
from .model import Suite

SUITES: dict[str, Suite] = {
    module.SUITE.name: module.SUITE
    for module in (
        pairs,
        qos,
        progress,
        overhead,
        oversubscribe,
        idle,
        faults,
        collectives,
        moe,
        startup,
        gpu,
        gpu_compute,
        gpu_mixed,
        gpu_ring,
        rdma,
    )
}

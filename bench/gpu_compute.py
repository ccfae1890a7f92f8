"""Suite `gpu-compute`: what a transfer at full rate costs the kernels of the GPU that sends."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from . import pair
from .gpu_driver import Driver
from .model import Column, Rule, Subject, Suite

if TYPE_CHECKING:
    from .model import Metrics, Options

_PROGRAMS = {
    "floor-copies": "child_floor",
    "copies-writes": "child_floor",
    "copies-words": "child_floor",
    "nccl-torch": "child_nccl",
    "aiocomm-gpu": "child_ours",
}
_KINDS = {
    "floor-copies": "raw",
    "copies-writes": "handmade",
    "copies-words": "handmade",
    "nccl-torch": "peer",
}
_TOLD = {"copies-writes": "write", "copies-words": "copy"}
_KERNELS = {
    "matmul2048": "matmul\n2048",
    "matmul8192": "matmul\n8192",
    "attention8192": "attention\n8192",
    "memory": "memory-\nbound",
}


def _missing() -> str:
    try:
        count = Driver(0).count()
    except (AttributeError, OSError) as error:
        return f"no GPU: {error}"
    if count < 2:
        return "needs two GPUs"
    return "" if importlib.util.find_spec("torch") else "not installed: pip install torch"


def _subjects(options: Options) -> list[Subject]:
    return [
        Subject(name, _KINDS.get(name, "ours"), "nvlink", _missing())  # type: ignore[arg-type]
        for name in _PROGRAMS
        if not options.peers or name in options.peers
    ]


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    program = f"{__package__}.gpu_compute_child:{_PROGRAMS[name]}"
    arguments = {"seconds": 0.2, "turns": 3} if options.quick else {"seconds": 0.3, "turns": 5}
    told = {"told": _TOLD.get(name, "")}
    found: Metrics = pair.run(program, arguments | told, options.timeout_s)[0]
    return found


_COLUMNS = tuple(
    Column(f"{metric}/{kernel}", f"{title}\n{unit}", digits, better)  # type: ignore[arg-type]
    for kernel, title in _KERNELS.items()
    for metric, unit, digits, better in (
        ("kept", "÷ alone", 3, "higher"),
        ("gbytes_s", "at GB/s", 0, "higher"),
        ("lost_us_per_gb", "lost, µs/GB", 1, "lower"),
    )
)

SUITE = Suite(
    "gpu-compute",
    "kernels beside a transfer at full rate",
    _subjects,
    measure,
    lambda options: _COLUMNS,
    (
        Rule("matmul 2048 beside a transfer ÷ alone", "aiocomm-gpu", "kept/matmul2048", ">=", 0.98),
        Rule("the same ÷ raw copies'", "aiocomm-gpu", "kept/matmul2048", ">=", 0.98, ("floor-copies",)),
        *(
            Rule(
                f"{kernel}, time lost per GB ÷ NCCL's",
                "aiocomm-gpu",
                f"lost_us_per_gb/{kernel}",
                "<=",
                0.5,
                ("nccl-torch",),
            )
            for kernel in ("matmul8192", "attention8192")
        ),
        Rule(
            "memory-bound, time lost per GB ÷ raw copies'",
            "aiocomm-gpu",
            "lost_us_per_gb/memory",
            "<=",
            1.1,
            ("floor-copies",),
        ),
    ),
)

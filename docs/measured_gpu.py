"""Tables and plots of the page on GPUs, from result files: no figure is written by hand."""

from __future__ import annotations

import json
import statistics
from typing import Any, Final

import plots

GPU: Final = "xeon-4xh200-gpu-2026-11-27"
COMPUTE: Final = "xeon-4xh200-gpu-compute-2026-11-27"
MIXED: Final = "xeon-2xh200-gpu-mixed-2026-11-29"


def gpu_table() -> str:
    """Medians and, in brackets, 99 of 100 of the suite `gpu`."""
    rows = (
        ("1 GiB one way, GB/s, two in flight (raw copies: all queued)", "gbytes_s/1GiB", "", 0),
        ("the same, each awaited", "gbytes_s_serial/1GiB", "", 0),
        ("256 MiB, each awaited", "gbytes_s_steady/256MiB", "", 0),
        ("1 GiB both ways, GB/s each", "gbytes_s_both/1GiB", "", 0),
        ("eight of 16 MiB outstanding, GB/s", "gbytes_s/16MiB", "", 0),
        ("put 1 GiB, GB/s, two in flight", "put_gbytes_s/1GiB", "", 0),
        ("get 1 GiB, GB/s, two in flight", "get_gbytes_s/1GiB", "", 0),
        ("pages of equal stride, GB/s, four calls in flight", "pages_gbytes_s/strided", "", 0),
        ("scattered pages, GB/s, four calls in flight", "pages_gbytes_s/scattered", "", 0),
        ("all_reduce of 256 MiB, µs", "all_reduce_us/256MiB", "", 0),
        ("all_reduce of 64 KiB, µs", "all_reduce_us/64KiB", "", 0),
        ("all_gather of 64 KiB, µs", "all_gather_us/64KiB", "", 0),
        ("64 KiB half round trip, µs (p99)", "half_us/64KiB", "p99_us/64KiB", 1),
        ("urgent 64 KiB beside bulk one way, µs (p99)", "urgent_us/one_way", "urgent_p99_us/one_way", 1),
        ("… and the bulk's rate ÷ with nothing urgent sent", "bulk_kept/one_way", "", 2),
        (
            "urgent 64 KiB beside bulk both ways, µs (p99)",
            "urgent_us/both_ways",
            "urgent_p99_us/both_ways",
            1,
        ),
        ("… bulk's rate, GB/s each way", "bulk_gbytes_s/both_ways", "", 0),
        ("share of weight 3 of 4", "share_of_3", "", 3),
        ("kernel launches ÷ alone", "launches_kept", "", 2),
        ("urgent p99 beside first sends of 40 buffers, µs", "p99_us/beside_first", "", 0),
        ("… beside the same ones again", "p99_us/beside_second", "", 0),
    )
    names = (
        "floor-copies",
        "nccl-torch",
        "nixl-gpu",
        "aiocomm-gpu",
        "aiocomm-gpu-uvloop",
        "aiocomm-gpu-spin",
    )
    taken = plots.samples(GPU)
    return _table(taken, names, rows)


def gpu_machine() -> str:
    """The machine that the figures are of, and how often they were taken."""
    record: dict[str, Any] = json.loads((plots.RESULTS / f"{GPU}.json").read_text())
    machine, rounds = record["machine"], record["options"]["rounds"]
    return (
        f"{machine['cores']} cores of a virtual machine ({machine['processor']}), Linux {machine['kernel']}, "
        f"Python {machine['python']}, torch {machine['versions']['torch']}; {record['date']}, "
        f"{rounds} interleaved rounds, from `bench/results/{GPU}.json`."
    )


def gpu_bandwidth() -> str:
    """Rates between two GPUs."""
    rows = [
        plots.Row("1 GiB one way", "gbytes_s/1GiB"),
        plots.Row("both ways, each", "gbytes_s_both/1GiB"),
        plots.Row("eight of 16 MiB", "gbytes_s/16MiB"),
    ]
    return plots.bars(plots.samples(GPU), rows, "GB/s")


def gpu_latency() -> str:
    """Times of 64 KiB between two GPUs, alone and beside bulk."""
    rows = [
        plots.Row("64 KiB half round trip", "half_us/64KiB", "p99_us/64KiB"),
        plots.Row("urgent beside bulk one way", "urgent_us/one_way", "urgent_p99_us/one_way"),
        plots.Row("beside bulk both ways", "urgent_us/both_ways", "urgent_p99_us/both_ways"),
    ]
    return plots.bars(plots.samples(GPU), rows, "µs", 1)


_KERNELS: Final = {
    "bf16 matmul 2048x4096x4096": "matmul2048",
    "bf16 matmul 8192 cubed": "matmul8192",
    "causal attention 8192": "attention8192",
    "memory-bound add": "memory",
}


def gpu_compute() -> str:
    """Time that kernels lose per gigabyte moved."""
    rows = [plots.Row(title, f"lost_us_per_gb/{name}") for title, name in _KERNELS.items()]
    return plots.bars(plots.samples(COMPUTE), rows, "µs/GB")


def gpu_compute_table() -> str:
    """Kernels' speed beside a transfer, and the transfer's."""
    rows = [(title, f"kept/{name}", f"gbytes_s/{name}", 3) for title, name in _KERNELS.items()]
    names = ("floor-copies", "nccl-torch", "aiocomm-gpu")
    return _table(plots.samples(COMPUTE), names, rows, "at")


def gpu_mixed_table() -> str:
    """Messages with host memory at one end, or a network between."""
    taken = [one["metrics"] for one in plots.samples(MIXED)]
    ways = {
        "GPU to host": "gpu_to_host",
        "host to GPU": "host_to_gpu",
        "GPU to an array of `aiocomm.empty()`": "gpu_to_shared",
        "an array of `aiocomm.empty()` to GPU": "shared_to_gpu",
        "GPU to GPU over tcp": "gpu_to_gpu_tcp",
        "GPU to host over tcp": "gpu_to_host_tcp",
        "host to GPU over tcp": "host_to_gpu_tcp",
    }
    lines = ["| 256 MiB, each awaited | GB/s | ÷ slower leg |", "|---|---|---|"]
    for title, name in ways.items():
        rate, of_leg = (
            statistics.median(one[f"{metric}/{name}"] for one in taken) for metric in ("gbytes_s", "of_leg")
        )
        lines.append(f"| {title} | {rate:.1f} | {of_leg:.2f} |")
    return "\n".join(lines)


def _table(
    taken: list[dict[str, Any]],
    names: tuple[str, ...],
    rows: tuple[tuple[str, str, str, int], ...] | list[tuple[str, str, str, int]],
    word: str = "",
) -> str:
    def cell(subject: str, metric: str, second: str, digits: int) -> str:
        def median(name: str) -> float | None:
            found = [
                one["metrics"][name] for one in taken if one["subject"] == subject and name in one["metrics"]
            ]
            return statistics.median(found) if found else None

        value, more = median(metric), median(second)
        if value is None:
            return ""
        text = f"{value:.{digits}f}"
        if more is None:
            return text
        return f"{text} {word} {more:.0f}" if word else f"{text} ({more:.0f})"

    head = [plots.NAMES[name] for name in names]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(names) + 1) + "|"]
    for title, metric, second, digits in rows:
        lines.append(f"| {title} | " + " | ".join(cell(n, metric, second, digits) for n in names) + " |")
    return "\n".join(lines)


MAKERS: Final = (
    gpu_table,
    gpu_machine,
    gpu_bandwidth,
    gpu_latency,
    gpu_compute,
    gpu_compute_table,
    gpu_mixed_table,
)

"""Suite `gpu`: two GPUs of one host, one process each: copy engines, NCCL, and ours.

Figures of ours are taken beside raw copies of the same run: GPUs and their links differ, and clocks drift.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from . import pair
from .gpu_driver import Driver
from .model import Column, Rule, Subject, Suite
from .sizes import GIB, MIB

if TYPE_CHECKING:
    from .model import Metrics, Options

_MODES = {"aiocomm-gpu": "asyncio", "aiocomm-gpu-uvloop": "uvloop", "aiocomm-gpu-spin": "aiocomm"}
_PROGRAMS = {"floor-copies": "gpu_floor", "nccl-torch": "gpu_nccl", "nixl-gpu": "gpu_nixl"} | dict.fromkeys(
    _MODES, "gpu_ours"
)

NAMES = (*_PROGRAMS, "copies-writes", "copies-words")


def _missing(name: str) -> str:
    try:
        if Driver(0).count() < 1:
            return "no GPU"
    except (AttributeError, OSError) as error:
        return f"no GPU: {error}"
    module = {"nccl-torch": "torch", "nixl-gpu": "nixl", "aiocomm-gpu-uvloop": "uvloop"}.get(name)
    if module and importlib.util.find_spec(module) is None:
        return f"not installed: pip install {module}"
    return ""


def _subjects(options: Options) -> list[Subject]:
    kinds = {"floor-copies": "raw", "nccl-torch": "peer", "nixl-gpu": "peer"}
    return [
        Subject(name, kinds.get(name, "ours"), "nvlink", _missing(name))  # type: ignore[arg-type]
        for name in _PROGRAMS
        if not options.peers or name in options.peers
    ]


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    arguments = {
        "large": 256 * MIB if options.quick else GIB,
        "repeats": 8 if options.quick else 20,
        "pings": 500 if options.quick else 3000,
        "loop": _MODES.get(name, ""),
    }
    program = f"{__package__}.{_PROGRAMS[name]}:child"
    found: Metrics = pair.run(program, arguments, options.timeout_s)[0]
    return found


_COLUMNS = (
    Column("gbytes_s/1GiB", "1 GiB one way\nGB/s", 1, "higher"),
    Column("gbytes_s_serial/1GiB", "one by\none", 1, "higher"),
    Column("gbytes_s_both/1GiB", "both ways\nGB/s each", 1, "higher"),
    Column("gbytes_s/16MiB", "8 of 16 MiB\nGB/s", 1, "higher"),
    Column("half_us/64KiB", "64 KiB half\ntrip, µs", 1),
    Column("p99_us/64KiB", "p99\nµs", 1),
    Column("urgent_us/one_way", "urgent 64 KiB under\nbulk one way, µs", 1),
    Column("urgent_p99_us/one_way", "p99\nµs", 1),
    Column("bulk_kept/one_way", "bulk ÷\nalone", 3, "higher"),
    Column("urgent_us/both_ways", "under bulk\nboth ways, µs", 1),
    Column("urgent_p99_us/both_ways", "p99\nµs", 1),
    Column("bulk_kept/both_ways", "bulk ÷\nalone", 3, "higher"),
    Column("put_gbytes_s/1GiB", "put 1 GiB\nGB/s", 1, "higher"),
    Column("get_gbytes_s/1GiB", "get 1 GiB\nGB/s", 1, "higher"),
    Column("pages_gbytes_s/strided", "pages of equal\nstride, GB/s", 1, "higher"),
    Column("pages_one_gbytes_s/strided", "one call\nby itself", 1, "higher"),
    Column("pages_get_gbytes_s/strided", "got,\nGB/s", 1, "higher"),
    Column("pages_gbytes_s/scattered", "scattered\npages, GB/s", 1, "higher"),
    Column("pages_over_raw/scattered", "÷ raw batches\nin turns", 2, "higher"),
    Column("pages_get_gbytes_s/scattered", "got,\nGB/s", 1, "higher"),
    Column("pages_gbytes_s/gathered", "scattered, with\n8 SMs, GB/s", 1, "higher"),
    Column("pages_one_gbytes_s/gathered", "one call\nby itself", 1, "higher"),
    Column("pages_get_gbytes_s/gathered", "got,\nGB/s", 1, "higher"),
    Column("all_gather_gbytes_s/128MiB", "all_gather of\n128 MiB, GB/s", 1, "higher"),
    Column("all_gather_us/1MiB", "of 1 MiB\nµs", 1),
    Column("all_gather_us/64KiB", "of 64 KiB\nµs", 1),
    Column("all_reduce_us/256MiB", "all_reduce of\n256 MiB, µs", 0),
    Column("all_reduce_us/64KiB", "of 64 KiB\nµs", 1),
    Column("share_of_3", "share of\nweight 3 of 4", 3, "neither"),
    Column("launches_kept", "launches ÷\nalone", 3, "higher"),
    Column("p99_us/beside_first", "p99 beside\nfirst sends, µs", 1),
    Column("p99_us/beside_second", "beside the\nsame again, µs", 1),
)
_FLOOR = ("floor-copies",)
_SPIN = "aiocomm-gpu-spin"

SUITE = Suite(
    "gpu",
    "GPU to GPU on one host",
    _subjects,
    measure,
    lambda options: _COLUMNS,
    (
        Rule("1 GiB, two in flight ÷ raw copies queued", _SPIN, "gbytes_s/1GiB", ">=", 0.985, _FLOOR),
        Rule("1 GiB, one by one ÷ raw copies awaited", _SPIN, "gbytes_s_serial/1GiB", ">=", 0.985, _FLOOR),
        Rule("1 GiB both ways ÷ raw", _SPIN, "gbytes_s_both/1GiB", ">=", 0.98, _FLOOR),
        Rule("8 of 16 MiB ÷ raw", _SPIN, "gbytes_s/16MiB", ">=", 0.97, _FLOOR),
        # 15 and 30 µs where one written by hand took 7.1.
        Rule("64 KiB half trip, spinning ÷ a raw copy", _SPIN, "half_us/64KiB", "<=", 15 / 7.1, _FLOOR),
        Rule("64 KiB half trip ÷ a raw copy", "aiocomm-gpu", "half_us/64KiB", "<=", 30 / 7.1, _FLOOR),
        Rule("urgent under bulk one way, µs", _SPIN, "urgent_us/one_way", "<=", 20),
        Rule("the same, p99, µs", _SPIN, "urgent_p99_us/one_way", "<=", 60),
        Rule("bulk beside it ÷ alone", _SPIN, "bulk_kept/one_way", ">=", 0.97),
        Rule("urgent under bulk both ways, p99, µs", _SPIN, "urgent_p99_us/both_ways", "<=", 150),
        Rule("bulk beside it ÷ alone", _SPIN, "bulk_kept/both_ways", ">=", 0.92),
        Rule("put 1 GiB, two in flight ÷ raw", _SPIN, "put_gbytes_s/1GiB", ">=", 0.98, _FLOOR),
        Rule(
            "pages of equal stride ÷ raw 2-D",
            _SPIN,
            "pages_gbytes_s/strided",
            ">=",
            0.95,
            _FLOOR,
        ),
        Rule("scattered pages with 8 SMs, GB/s", _SPIN, "pages_gbytes_s/gathered", ">=", 230),
        Rule("scattered pages ÷ raw batch, in turns", _SPIN, "pages_over_raw/scattered", ">=", 1.0),
        Rule("all_gather of 1 MiB, µs", _SPIN, "all_gather_us/1MiB", "<=", 35),
        Rule("all_gather of 64 KiB, µs", _SPIN, "all_gather_us/64KiB", "<=", 35),
        Rule("all_reduce of 64 KiB, µs", _SPIN, "all_reduce_us/64KiB", "<=", 30),
        Rule(
            "all_reduce 256 MiB ÷ NCCL's",
            _SPIN,
            "all_reduce_us/256MiB",
            "<=",
            1.1,
            ("nccl-torch",),
        ),
        Rule("weights 3:1, error of a share", _SPIN, "share_error", "<=", 0.05),
        Rule("launches beside copies ÷ alone", _SPIN, "launches_kept", ">=", 0.96),
    ),
)

"""`aiocomm demo`: prefill in one process, decode in another, and the same in one process to compare.

Exit status: 0 if the split gives the tokens of one process, 1 if not or if it failed, 2 for a bad request.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import aiocomm
from aiocomm.demo import latency, split
from aiocomm.demo.blas import limit_threads
from aiocomm.demo.model import KVCache, ModelConfig, Transformer
from aiocomm.demo.report import Report

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["add_arguments", "main"]

_ROUNDS = 3000  # a 99th percentile of a few hundred is the worst three
_CASE_LIMIT_S = 0.4
_TOKEN_NBYTES = 2048  # of the receive that is posted for each token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `aiocomm demo`."""
    parser.add_argument(
        "--prompt", metavar="FILE", type=Path, help="text to prefill (default: one that is shipped)"
    )
    parser.add_argument(
        "--tokens", metavar="N", type=_positive, default=32, help="tokens to generate (%(default)s)"
    )
    parser.add_argument("--layers", metavar="N", type=_positive, default=8, help="layers (%(default)s)")
    parser.add_argument(
        "--dim", metavar="N", type=_positive, default=256, help="width, a multiple of 128 (%(default)s)"
    )
    parser.add_argument(
        "--link", choices=("shm", "tcp"), default="shm", help="link between the two (%(default)s)"
    )
    parser.add_argument(
        "--context",
        metavar="N",
        type=_context,
        default=8192,
        help="bytes of the prompt to use at most (%(default)s)",
    )
    parser.add_argument(
        "--threads", metavar="N", type=_positive, help="BLAS threads per process (default: half of the cores)"
    )
    parser.add_argument("--seed", metavar="N", type=_natural, default=0, help="of the weights (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def main(args: argparse.Namespace) -> int:
    """Run the demo, print the report, and return the exit status."""
    errors = Console(stderr=True, highlight=False)
    try:
        model = ModelConfig.sized(args.layers, args.dim, args.seed)
        prompt = _read_prompt(args.prompt)
        _refuse_too_large(model, min(len(prompt), args.context), args.tokens)
    except (OSError, ValueError, OverflowError) as error:
        errors.print(f"aiocomm demo: {error}", markup=False, soft_wrap=True)
        return 2
    if len(prompt) > args.context:
        errors.print(
            f"using the first {args.context:,} of {len(prompt):,} bytes of the prompt (see --context)"
        )
        prompt = prompt[: args.context]
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // 2)
    report = None
    try:
        report = aiocomm.run(_demo(model, prompt, args.tokens, args.link, threads, errors))
    except* aiocomm.AiocommError as failed:
        for failure in failed.exceptions:
            errors.print(f"aiocomm demo: {failure}", markup=False)
    if report is None:
        return 1
    if args.json:
        json.dump(report.as_json(), sys.stdout, indent=2)
        print()
    else:
        report.show(Console(highlight=False))
    return 0 if report.equal else 1


async def _demo(
    config: ModelConfig, prompt: NDArray[np.uint8], count: int, link: str, threads: int, errors: Console
) -> Report:
    limit_threads(threads)
    job = split.Job(config, len(prompt) + count, threads)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=errors,
        transient=True,
        refresh_per_second=4,  # more would show in the times
        disable=not errors.is_terminal,
    )
    async with aiocomm.spawn(split.decode_worker, 1, job, links=[link]) as comm:
        model, cache = Transformer(config), KVCache(config, job.capacity, aiocomm.empty)
        warm = prompt[-min(len(prompt), 64) :]
        split.run_single(model, cache, warm, 2)
        await split.run_split(comm, model, cache, warm, 2)  # connects, and touches both sides' buffers
        with bar:
            task = bar.add_task("one process", total=2 * (config.layers + count))
            advance = functools.partial(bar.advance, task)
            single = split.run_single(model, cache, prompt, count, advance)
            bar.update(task, description="split")
            two = await split.run_split(comm, model, cache, prompt, count, advance)
        latencies = [
            await latency.measure(comm, cache, len(prompt) - 1, nbytes, case, _ROUNDS, _CASE_LIMIT_S)
            for nbytes, case in latency.PLAN
        ]
        await split.stop(comm)
    return Report(config, link, threads, len(prompt), single, two, tuple(latencies))


def _read_prompt(path: Path | None) -> NDArray[np.uint8]:
    source = path or resources.files("aiocomm.demo") / "prompt.txt"
    prompt = np.frombuffer(source.read_bytes(), np.uint8)
    if len(prompt) < 2:
        raise ValueError(f"the prompt {path} must have at least 2 bytes")
    return prompt


def _refuse_too_large(model: ModelConfig, prompt: int, tokens: int) -> None:
    """Raise if two processes of it do not fit into the memory that is free: it would be filled first."""
    capacity = prompt + tokens
    work = 4 * prompt * (4 * model.dim + 3 * model.ffn)  # of a layer's prefill
    each = model.weights_nbytes + capacity * model.kv_nbytes_per_token + tokens * _TOKEN_NBYTES + work
    free = _free_memory()
    if 2 * each > free:
        raise ValueError(
            f"{model.layers:,} layers of width {model.dim:,} for {prompt:,} + {tokens:,} tokens take "
            f"{2 * each // 10**9:,} GB in two processes, and {free // 10**9:,} GB are free "
            "(see --tokens, --layers, --dim)"
        )


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
    return value


_natural = functools.partial(_at_least, 0)
_positive = functools.partial(_at_least, 1)
_context = functools.partial(_at_least, 2)  # one byte to prefill, one to decode

"""What the demo prints: the two runs side by side, the transfer, urgent latency, and the same as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from aiocomm.demo.latency import Latency
    from aiocomm.demo.model import ModelConfig
    from aiocomm.demo.split import Run, SplitRun

__all__ = ["Report", "busy", "hidden"]

_PREVIEW = 40
_CASES = {
    "idle": "idle",
    "urgent": "beside bulk, urgent channel",
    "same": "beside bulk, in its channel",
}


def busy(intervals: Iterable[tuple[float, float]], until: float = float("inf")) -> float:
    """Length of the union of `intervals`, as far as it lies before `until`. All in seconds."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        start, stop = max(start, end), min(stop, until)
        if stop > start:
            total += stop - start
            end = stop
    return total


def hidden(submitted: Sequence[float], arrived: Sequence[float], prefilled: float) -> float:
    """Overlap: the share of the transfer that was hidden behind prefill, 0 to 1.

    A layer is in transfer from its submission at the prefill worker until the decode worker resumes with its
    keys and values. The share is the time in which any layer was in transfer before prefill ended, over all
    such time. The last layer's keys and values are ready only when prefill ends, so with n layers of equal
    times it is (n - 1) / n at best, and never 1.
    """
    intervals = list(zip(submitted, arrived, strict=True))
    total = busy(intervals)
    return busy(intervals, prefilled) / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """Results of one invocation."""

    model: ModelConfig
    link: str
    threads: int
    prompt_bytes: int
    single: Run
    split: SplitRun
    latencies: tuple[Latency, ...]

    @property
    def equal(self) -> bool:
        """Whether the split gave the tokens, and moved the keys and values, of the run in one process."""
        return self.single.tokens == self.split.tokens and self.single.checksum == self.split.checksum

    @property
    def transfer_s(self) -> float:
        """Seconds in which keys and values were on their way."""
        return busy(zip(self.split.submitted_s, self.split.arrived_s, strict=True))

    @property
    def hidden(self) -> float:
        """Share of the transfer hidden behind prefill; see `hidden`."""
        return hidden(self.split.submitted_s, self.split.arrived_s, self.split.prefilled_s)

    def as_json(self) -> dict[str, Any]:
        """Plain values, seconds and bytes."""

        def run(result: Run) -> dict[str, Any]:
            return {
                "prefill_s": result.prefilled_s,
                "time_to_first_token_s": result.first_token_s,
                "per_token_s": result.per_token_s,
            }

        return {
            "link": self.link,
            "layers": self.model.layers,
            "dim": self.model.dim,
            "blas_threads": self.threads,
            "prompt_bytes": self.prompt_bytes,
            "tokens": list(self.split.tokens),
            "tokens_equal": self.single.tokens == self.split.tokens,
            "kv_equal": self.single.checksum == self.split.checksum,
            "single": run(self.single),
            "split": run(self.split),
            "kv_bytes": self.split.nbytes,
            "kv_bytes_per_s": self.split.nbytes / self.transfer_s,
            "hidden_share": self.hidden,
            "latency": [
                {
                    "nbytes": latency.nbytes,
                    "case": latency.case,
                    "rounds": len(latency.half_trips_s),
                    "p50_s": latency.percentile(50),
                    "p99_s": latency.percentile(99),
                    "bulk_bytes_per_s": latency.bulk_bytes_per_s,
                }
                for latency in self.latencies
            ],
        }

    def show(self, console: Console) -> None:
        """Print everything for a person."""
        console.print(
            f"[bold]prefill → decode over {self.link}[/]\n{self.model.layers} layers of {self.model.dim}, "
            f"prompt of {self.prompt_bytes:,} bytes, {len(self.split.tokens)} tokens, "
            f"{self.threads} BLAS thread{'s' * (self.threads > 1)} per process\n"
        )
        console.print(self._runs())
        console.print(self._transfer())
        console.print(self._latency())
        console.print("one run of each on this machine: differences of some percent between them are noise\n")
        text = bytes(self.split.tokens)
        console.print(f"text (random weights): {escape(repr(text[:_PREVIEW]))}", soft_wrap=True)
        tokens = _verdict(self.single.tokens == self.split.tokens)
        cache = _verdict(self.single.checksum == self.split.checksum)
        console.print(f"tokens equal: {tokens}   keys and values equal: {cache}")

    def _runs(self) -> Table:
        table = _table("", "one process", "split")
        single, split = self.single, self.split
        table.add_row("time to first token", _time(single.first_token_s), _time(split.first_token_s))
        table.add_row("  of it prefill", _time(single.prefilled_s), _time(split.prefilled_s))
        handover = [_time(run.first_token_s - run.prefilled_s) for run in (single, split)]
        table.add_row("  of it from prefill's end", *handover)
        table.add_row("per token after the first", _time(single.per_token_s), _time(split.per_token_s))
        return table

    def _transfer(self) -> Table:
        table = _table("keys and values", "")
        table.add_row("moved", f"{self.split.nbytes / 1e6:.1f} MB in {2 * self.model.layers} messages")
        table.add_row("rate while on their way", f"{self.split.nbytes / self.transfer_s / 1e9:.2f} GB/s")
        table.add_row("transfer hidden behind prefill", f"{self.hidden:.0%} of {_time(self.transfer_s)}")
        return table

    def _latency(self) -> Table:
        table = _table("half round trip", "median", "p99", "pings", "bulk")
        for latency in self.latencies:
            bulk = f"{latency.bulk_bytes_per_s / 1e9:.2f} GB/s" if latency.case != "idle" else ""
            times = (_time(latency.percentile(percent)) for percent in (50, 99))
            name = f"{latency.nbytes >> 10} KiB {_CASES[latency.case]}"
            table.add_row(name, *times, f"{len(latency.half_trips_s):,}", bulk)
        return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, min_width=28)
    for name in others:
        table.add_column(name, justify="right", min_width=7)
    return table


def _verdict(equal: bool) -> str:
    return "[green]yes[/]" if equal else "[red]no[/]"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"

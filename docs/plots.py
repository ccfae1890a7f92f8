"""Plots of result files, as SVG in a page: no plotting library, and colours of the page's theme."""

from __future__ import annotations

import html
import json
import statistics
from pathlib import Path
from typing import Any, Final, NamedTuple

RESULTS: Final = Path(__file__).resolve().parent.parent / "bench" / "results"

NAMES: Final = {
    "floor-copies": "raw copies",
    "nccl-torch": "NCCL",
    "nixl-gpu": "NIXL",
    "copies-writes": "raw, told by a written value",
    "copies-words": "raw, told by a copied word",
    "aiocomm-gpu": "aiocomm, asyncio",
    "aiocomm-gpu-uvloop": "aiocomm, uvloop",
    "aiocomm-gpu-spin": "aiocomm, run(spin=50e-6)",
}
_COLOURS: Final = {"floor-copies": "#8a8f98", "nccl-torch": "#d98c3f", "nixl-gpu": "#b5654a"}
_OURS: Final = ("#3f6fb5", "#5b8fd0", "#7fb0e8")
_WIDTH, _LABEL, _BAR, _GAP, _VALUE = 720, 190, 15, 12, 74


class Row(NamedTuple):
    """A group of bars: a title, a metric, a second one that a thin line leads to (p99), and a bound."""

    title: str
    metric: str
    tail: str = ""
    bound: float | None = None


def samples(name: str) -> list[dict[str, Any]]:
    """Samples of a result file."""
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["samples"]
    return found


def bars(taken: list[dict[str, Any]], rows: list[Row], unit: str, digits: int = 0) -> str:
    """Medians over rounds as horizontal bars, with what was lowest and highest, one group per row."""
    subjects = [name for name in NAMES if any(one["subject"] == name for one in taken)]
    ours = [name for name in subjects if name not in _COLOURS]
    colours = _COLOURS | dict(zip(ours, _OURS, strict=False))

    def of(subject: str, metric: str) -> list[float]:
        return [
            one["metrics"][metric] for one in taken if one["subject"] == subject and metric in one["metrics"]
        ]

    largest = max(
        (value for row in rows for name in subjects for m in (row.metric, row.tail) for value in of(name, m)),
        default=1.0,
    )
    scale = (_WIDTH - _LABEL - _VALUE) / largest
    parts, y = [], 4.0
    for row in rows:
        top = y
        for name in subjects:
            found = of(name, row.metric)
            if not found:
                continue
            middle, low, high = statistics.median(found), min(found), max(found)
            tail = of(name, row.tail)
            text = f"{middle:.{digits}f}"
            end = _LABEL + scale * max(high, middle)
            at = y + _BAR / 2
            tip = f"{NAMES[name]}: {text} {unit} ({low:.{digits}f} to {high:.{digits}f})"
            parts.append(
                f'<g><title>{html.escape(tip)}</title><rect x="{_LABEL}" y="{y:.0f}" '
                f'width="{scale * middle:.1f}" height="{_BAR}" fill="{colours[name]}"/>'
                f'<path d="M{_LABEL + scale * low:.1f} {at}H{_LABEL + scale * high:.1f}" '
                'stroke="currentColor" stroke-width="1.5"/></g>'
            )
            if tail:
                p99 = statistics.median(tail)
                end = max(end, _LABEL + scale * p99)
                text += f" (p99 {p99:.{digits}f})"
                parts.append(
                    f'<path d="M{_LABEL + scale * middle:.1f} {at}H{_LABEL + scale * p99:.1f}" '
                    f'stroke="{colours[name]}" stroke-dasharray="2 2"/>'
                    f'<circle cx="{_LABEL + scale * p99:.1f}" cy="{at}" r="2.5" fill="{colours[name]}"/>'
                )
            parts.append(f'<text x="{end + 6:.1f}" y="{at + 4}">{text}</text>')
            y += _BAR + 2
        parts.append(
            f'<text x="{_LABEL - 8}" y="{(top + y) / 2 + 3:.0f}" text-anchor="end">{row.title}</text>'
        )
        if row.bound is not None:
            x = _LABEL + scale * row.bound
            parts.append(f'<path d="M{x:.1f} {top - 2:.0f}V{y:.0f}" stroke="#c33" stroke-width="1.5"/>')
        y += _GAP
    legend = []
    x = float(_LABEL)
    for name in subjects:
        legend.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="10" height="10" fill="{colours[name]}"/>'
            f'<text x="{x + 14:.0f}" y="{y + 9:.0f}">{NAMES[name]}</text>'
        )
        x += 26 + 6.3 * len(NAMES[name])
    return (
        f'<svg viewBox="0 0 {_WIDTH + 120} {y + 16:.0f}" role="img" style="max-width:100%" '
        'font-size="11" font-family="sans-serif" fill="currentColor">' + "".join(parts + legend) + "</svg>"
    )

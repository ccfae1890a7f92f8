"""The README's table from result files: `python -m aiocomm_bench.markdown FILE...`."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

_COLUMNS = (
    ("half_us/8B", "8 B half trip, µs", "{:.1f}"),
    ("half_us/64KiB", "64 KiB, µs", "{:.1f}"),
    ("gbytes_s/64MiB", "64 MiB, GB/s", "{:.1f}"),
    ("gbytes_s/1GiB", "1 GiB, GB/s", "{:.1f}"),
    ("cpu_s_per_gb/64MiB", "CPU s/GB", "{:.2f}"),
    ("messages_s", "msg/s, 64 open", "{:,.0f}"),
    ("idle_cores", "idle cores", "{:.2f}"),
)


def pairs(record: dict[str, Any]) -> list[str]:
    """One row per peer: medians over the rounds."""
    found: dict[str, dict[str, list[float]]] = {}
    for sample in record["samples"]:
        if sample["suite"] == "pairs" and not sample["error"]:
            for metric, value in sample["metrics"].items():
                found.setdefault(sample["subject"], {}).setdefault(metric, []).append(value)
    lines = ["| | " + " | ".join(title for _, title, _ in _COLUMNS) + " |", "|---|" + "--:|" * len(_COLUMNS)]
    for subject in sorted(found, key=lambda name: (not name.startswith("aiocomm"), name)):
        cells = [
            form.format(statistics.median(values)) if (values := found[subject].get(metric)) else "-"
            for metric, _, form in _COLUMNS
        ]
        name = f"**{subject}**" if subject.startswith("aiocomm") else subject
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def checks(record: dict[str, Any]) -> list[str]:
    """One row per figure that must hold and was measured."""
    lines = ["| what | of | measured (lowest to highest round) | must |", "|---|---|--:|--:|"]
    signs = {"<=": "≤", ">=": "≥"}
    for check in record["checks"]:
        if (figure := check.get("figure")) is None:
            continue
        against = f" of {figure['against']}" if figure.get("against") else ""
        if absent := check.get("without"):
            against += f", without {', '.join(absent)}"
        measured = f"{figure['median']:.3g} ({figure['low']:.3g} to {figure['high']:.3g}){against}"
        verdict = "" if check["verdict"] == "pass" else ", **missed**"
        bound = f"{signs[check['relation']]} {check['bound']:g}{verdict}"
        lines.append(f"| {check['what']} | {check['subject']} | {measured} | {bound} |")
    return lines


def main() -> None:
    """Print the tables of each file."""
    for path in sys.argv[1:]:
        record = json.loads(Path(path).read_text())
        for table in (pairs(record), checks(record)):
            if len(table) > 2:
                print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()

"""Result files: samples with the machine they came from, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .model import Options, Sample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .checks import Verdict

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """What one run of the tool found."""

    machine: Mapping[str, Any]
    date: str
    options: Options
    samples: tuple[Sample, ...]
    missing: Mapping[str, str]  # subject -> what to install


def save(path: Path, record: Record, verdicts: Sequence[Verdict]) -> None:
    """Write the record; `verdicts` are written for readers and computed anew when it is loaded."""
    options = {
        **asdict(record.options),
        "peers": list(record.options.peers),
        "sizes": list(record.options.sizes),
    }
    content = {
        "format": FORMAT,
        "machine": dict(record.machine),
        "date": record.date,
        "options": options,
        "missing": dict(record.missing),
        "checks": [
            {
                **asdict(v.rule),
                "figure": asdict(v.figure) if v.figure else None,
                "verdict": v.word,
                "without": dict(v.without),  # peer -> rounds
            }
            for v in verdicts
        ],
        "samples": [s.to_json() for s in record.samples],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(content), indent=1) + "\n")


def load(path: Path) -> Record:
    """Read a record.

    Raises:
        ValueError: Not a result file of this format.
    """
    text = path.read_bytes()
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        options = content["options"]
        options = Options(**{**options, "peers": tuple(options["peers"]), "sizes": tuple(options["sizes"])})
        samples = tuple(Sample.from_json(s) for s in content["samples"])
        return Record(content["machine"], content["date"], options, samples, content["missing"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not a result file of format {FORMAT}: {error}") from error


def _rounded(value: Any) -> Any:
    """Six significant digits are more than any of this is worth."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value

"""What a link can do where it works: declared once per link, shown in the documentation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

__all__ = ["Capabilities"]


def _row(title: str, default: str = "-") -> str:
    value: str = field(default=default, metadata={"title": title})
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """A line per question that decides between links."""

    reach: str = _row("between")
    memory: str = _row("memory")
    paths: str = _row("paths, best first")
    wake: str = _row("wakes a sleeping peer by")
    loss: str = _row("a dead peer is seen by")
    encryption: str = _row("encryption")
    reductions: str = _row(
        "reductions of",
        "host arrays: repeats of plain C dtypes in the extension, else in NumPy; bfloat16 and float8 with "
        "ml_dtypes",
    )
    experts: str = _row("dispatch and combine of", "host arrays")

    def rows(self) -> list[tuple[str, str]]:
        """Title and value of each line."""
        return [(item.metadata["title"], getattr(self, item.name)) for item in dataclasses.fields(self)]

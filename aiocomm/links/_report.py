"""What a link's discovery found: plain values that the doctor prints and scripts read."""

from __future__ import annotations

import enum
import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Check", "Report", "State", "is_built", "package_version", "read_text"]


class State(enum.StrEnum):
    """Outcome of one check."""

    OK = "ok"
    LIMITED = "limited"
    """The link works, but slower or with something missing."""
    FAILED = "failed"
    """The link cannot work."""
    INFO = "info"
    """A fact, neither good nor bad."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at or tried. `advice` says what to do about it, empty if nothing."""

    name: str
    state: State
    detail: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything found out about one link on this machine.

    `built` says whether this version of aiocomm carries the link at all; the checks say what the machine has.
    `facts` are what another host needs to tell whether the two get on (`aiocomm doctor --against`).
    """

    link: str
    built: bool
    summary: str
    checks: tuple[Check, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether the link can carry data here and now."""
        return self.built and all(check.state is not State.FAILED for check in self.checks)


def is_built(link: str) -> bool:
    """Whether the installed native module carries a link; asked of it, not assumed."""
    return link in _core.available_links()


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_text(path: str | Path) -> str | None:
    """A small file of /proc or /sys, stripped; None if it is missing or refused (some are, on reading)."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None

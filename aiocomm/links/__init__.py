"""Discovery: what this machine can do per link.

One module per link, each with `discover() -> Report` and its `CAPABILITIES`.

A new link is a new module here; nothing else is edited.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any, Final

from aiocomm.links._capabilities import Capabilities
from aiocomm.links._report import Check, Report, State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "CAPABILITY_ROWS",
    "Capabilities",
    "Check",
    "Report",
    "State",
    "capabilities",
    "compare",
    "discover",
    "names",
]

CAPABILITY_ROWS: Final = tuple(item.metadata["title"] for item in dataclasses.fields(Capabilities))
"""Titles of what `Capabilities.rows` tells, in order."""


def names() -> tuple[str, ...]:
    """Names of all known links, built or not, in alphabetical order."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def discover(link: str) -> Report:
    """Look at this machine for one link. Starts short-lived child processes; takes a fraction of a second.

    Raises:
        ValueError: there is no such link.
    """
    if link not in names():
        raise ValueError(f"no link called {link!r}: there are {', '.join(names())}")
    look: Callable[[], Report] = importlib.import_module(f"{__name__}.{link}").discover
    return look()


def compare(link: str, theirs: Mapping[str, Any]) -> list[Check]:
    """Tell whether this machine and another get on over a link; empty where there is nothing to compare.

    Args:
        link: Its name.
        theirs: The `facts` of the other's report.

    Raises:
        ValueError: `theirs` are not facts about this link.
    """
    look: Callable[[Mapping[str, Any]], list[Check]] | None = getattr(
        importlib.import_module(f"{__name__}.{link}"), "compare", None
    )
    return look(theirs) if look else []


def capabilities(link: str) -> Capabilities:
    """What a link can do where it works.

    Raises:
        ValueError: there is no such link.
    """
    if link not in names():
        raise ValueError(f"no link called {link!r}: there are {', '.join(names())}")
    found: Capabilities = importlib.import_module(f"{__name__}.{link}").CAPABILITIES
    return found

"""Settings as text: the variables that set them, how values are read, and what must hold of them."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, Final

from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

__all__ = ["check", "read", "unknown", "variable"]

_PREFIX: Final = "AIOCOMM_"
_NEAR: Final = 0.75  # slips of the pen are nearer to what was meant, names that others chose are farther

_SIZE: Final = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_TIME: Final = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*(us|µs|ms|s|)", re.IGNORECASE)
_TIME_UNITS: Final = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"{_PREFIX}{name.upper()}"


def unknown(names: Iterable[str], known: Collection[str]) -> list[tuple[str, str | None]]:
    """Names that look like variables of ours and are not, each with the one that is likely to be meant.

    None is where nothing is near: the prefix is anybody's, such as tests' or a container's.
    """
    known = [name.removeprefix(_PREFIX) for name in known]
    found: list[tuple[str, str | None]] = []
    for name in sorted(names):
        own = name.removeprefix(_PREFIX)
        if own == name or own in known:
            continue
        near = difflib.get_close_matches(own, known, 1, _NEAR)
        found.append((name, _PREFIX + near[0] if near else None))
    return found


def read(name: str, kind: str, unit: str, text: str) -> Any:
    """The value that a text means.

    Args:
        kind: its type, as a field of `Settings` names it.

    Raises:
        UsageError: it means none.
    """
    try:
        if kind == "int":
            return _size(text) if unit == "bytes" else int(text)
        if kind == "float":
            return _seconds(text) if unit == "seconds" else float(text)
    except ValueError:
        raise UsageError(f"{variable(name)} must be {_number(kind, unit)}, not {text!r}") from None
    if kind.startswith("tuple"):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if name == "log_level":
        return text.upper()
    return text


def _number(kind: str, unit: str) -> str:
    if unit == "fraction":
        return "a fraction, such as 0.05"
    if unit in ("", "index"):
        return "a whole number" if kind == "int" else "a number"
    return f"a number of {unit}"


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    return int(match[1]) << (10 * " KMGT".index(match[2].upper() or " "))


def _seconds(text: str) -> float:
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    return float(match[1]) * _TIME_UNITS[match[2].lower()]


def check(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    """Refuse a value that is beyond the limits of its setting, by a UsageError."""
    if "choices" in limits and value not in limits["choices"]:
        raise UsageError(f"{variable(name)} must be one of {', '.join(limits['choices'])}, not {value!r}")
    if "each" in limits:
        words = [word.strip() for word in value.split(",")]
        if len(words) not in (1, 4) or any(
            not (word.isascii() and word.isdigit()) or int(word) > limits["each"] for word in words
        ):
            raise UsageError(
                f"{variable(name)} must be a number from 0 to {limits['each']}, or four of them by comma "
                f"(low, normal, high, urgent), not {value!r}"
            )
    if "pattern" in limits and value is not None and not re.fullmatch(limits["pattern"], value):
        raise UsageError(f"{variable(name)} must be like {limits['example']!r}, not {value!r}")
    if "most" in limits and value is not None:
        count = sum(bool(part.strip()) for part in value.split(","))
        if count > limits["most"]:
            raise UsageError(f"{variable(name)} names {count}, and no more than {limits['most']} are used")
    unit = limits["unit"] if limits["unit"] not in ("fraction", "index") else ""
    if "low" in limits and not value >= limits["low"]:  # also catches NaN
        raise UsageError(
            f"{variable(name)} must be at least {limits['low']} {unit}".rstrip() + f", not {value}"
        )
    if "high" in limits and value > limits["high"]:
        raise UsageError(
            f"{variable(name)} must be at most {limits['high']} {unit}".rstrip() + f", not {value}"
        )

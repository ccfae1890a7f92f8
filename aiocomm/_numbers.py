"""Whole numbers among the arguments of a call: Python's, NumPy's, or of any library that has an index."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from aiocomm.errors import UsageTypeError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["integer", "integers", "number"]


def integer(name: str, value: Any) -> int:
    """An argument as a number.

    Raises:
        UsageError: it is none, or would have to be rounded.
    """
    try:
        return int(operator.index(value))  # of True, too, which is 1 to the other ranks
    except TypeError:
        raise UsageTypeError(f"{name}={value!r} is not an integer") from None


def number(name: str, value: Any) -> int:
    """The same of an argument for which a truth value is a mistake: of a mask, or a yes to how many.

    Raises:
        UsageError: it is one, or as for `integer`.
    """
    if isinstance(value, bool):
        raise UsageTypeError(f"{name}={value!r} is a truth value, and not an integer")
    return integer(name, value)


def integers(name: str, values: Iterable[Any] | None, of_what: str) -> tuple[int, ...]:
    """An argument as numbers.

    Args:
        of_what: what each of them is of, for the message.

    Raises:
        UsageError: it is no sequence of them, or they would have to be rounded.
    """
    if values is None:
        raise UsageTypeError(f"{name} is missing: one integer per {of_what}")
    try:
        return tuple(int(operator.index(value)) for value in values)
    except TypeError:
        raise UsageTypeError(f"{name}={values!r}: pass one integer per {of_what}") from None

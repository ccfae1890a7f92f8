"""Sizes in bytes, as people write them."""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"": 1, "B": 1, "KIB": KIB, "MIB": MIB, "GIB": GIB, "K": KIB, "M": MIB, "G": GIB}


def parse(text: str) -> int:
    """Return the bytes that ``text`` names: ``8``, ``64KiB``, ``1G``.

    Raises:
        ValueError: Not a positive number with a known unit.
    """
    digits = text.strip().rstrip("BKMGIbkmgi")
    unit = text.strip()[len(digits) :].upper()
    if unit not in _UNITS or not digits.isdigit() or int(digits) == 0:
        raise ValueError(f"{text!r} is not a size: write 8, 64KiB, 1MiB or 1GiB")
    return int(digits) * _UNITS[unit]


def show(nbytes: int) -> str:
    """Return ``nbytes`` with the largest unit that divides it."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes % unit == 0 and nbytes:
            return f"{nbytes // unit}{name}"
    return f"{nbytes}B"

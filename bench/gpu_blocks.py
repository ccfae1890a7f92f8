"""Which blocks the figures of pages are about: 4,096 of 32 KiB, in two arrangements."""

from __future__ import annotations

import random
from typing import Final

from .sizes import KIB

__all__ = ["AT_ONCE", "BLOCK", "BLOCKS", "CALLS", "LAYERS", "PAGES", "SCATTERED", "STRIDED", "pages"]

AT_ONCE: Final = 4  # calls, as of several requests or layers
CALLS: Final = 24
BLOCK: Final = 32 * KIB
BLOCKS: Final = 4096
LAYERS: Final = 128  # K and V of 64
PAGES: Final = BLOCKS // LAYERS
STRIDED: Final = (LAYERS, 2 * PAGES, BLOCK)  # shape of an array in which a page has a row in each layer
SCATTERED: Final = (2 * BLOCKS, BLOCK)  # shape of one in which a page is a block by itself


def pages(count: int, available: int, seed: int) -> list[int]:
    """Page numbers in no order, and without neighbours on both sides for another seed."""
    return random.Random(seed).sample(range(available), count)

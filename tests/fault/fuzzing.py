"""What fuzzing tests share: seed and length, by the environment, and a look at memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

SEED: Final = int(os.environ.get("AIOCOMM_FUZZ_SEED", "0"))
ROUNDS: Final = int(os.environ.get("AIOCOMM_FUZZ_ROUNDS", "1"))


def seeds(count: int) -> range:
    """Seeds for that many cases a round."""
    return range(SEED, SEED + count * ROUNDS)


def resident(pid: int | str = "self") -> int:
    """Bytes of memory that a process has in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()

"""Opens the devices as `connect` would, and tells which it does without.

Only the link knows all its reasons. A child opens them (`python -m aiocomm.links._rdma_probe`): a driver may
hang, or end its process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Final

from aiocomm import _outcome
from aiocomm.config import Settings
from aiocomm.errors import AiocommError
from aiocomm_native import _core

__all__ = ["left_out"]

_COMMAND: Final = (sys.executable, "-P", "-m", __name__)  # -P: not what lies in the working folder
_TIMEOUT_S: Final = 60.0


def left_out() -> list[tuple[str, str]]:
    """Devices ("mlx5_0") and ports ("mlx5_0:1") that the link does without, each with why.

    Raises:
        OSError: the link cannot be opened; or the child cannot be started, or does not end.
    """
    try:
        done = subprocess.run(_COMMAND, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"no answer within {_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or [f"its process ended by {done.returncode}"])[-1])
    return [(name, reason) for name, reason in json.loads(done.stdout)]


def _open() -> list[tuple[str, str]]:
    _outcome.install()  # errors are ours
    engine = _core.Engine(["rdma"], *Settings.from_environment().native_arguments())
    try:
        return engine.left_out("rdma")
    finally:
        engine.close()
        engine.release_descriptors()


if __name__ == "__main__":
    try:
        print(json.dumps(_open()))
    except AiocommError as error:
        sys.exit(str(error))

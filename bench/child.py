"""Entry of a process of a pair.

``python -m aiocomm_bench.child MODULE:FUNCTION ARGUMENTS FOLDER ROLE CONTROL_FDS SIZE``
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
from pathlib import Path

from .control import Control

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Call the function and leave its result in the folder."""
    program, arguments, folder, role_text, control_fds, size = sys.argv[1:]
    faulthandler.enable()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # leave no spinning orphan
    role = int(os.environ["OMPI_COMM_WORLD_RANK"]) if role_text == "mpi" else int(role_text)
    fds = [int(fd) for fd in control_fds.split(",")]
    control = None if fds == [-1] else Control(fds, int(size))
    module, function = program.split(":")
    result = getattr(importlib.import_module(module), function)(role, control, json.loads(arguments))
    (Path(folder) / f"{role}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    if control is not None:
        control.swap("done")
        os._exit(0)  # some peers hang or crash in their destructors; their figures are safe by now


if __name__ == "__main__":
    main()

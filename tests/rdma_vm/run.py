"""Run a command in a virtual machine with soft-RoCE: two hosts of two rails, this checkout, this Python.

    python tests/rdma_vm/run.py -- pytest tests/links -k rdma
    python tests/rdma_vm/run.py -- python tests/rdma_vm/guest/perftest.py
    python tests/rdma_vm/run.py -- bash -c 'rdma link; ibv_devinfo -d rxea0'

Prints what it prints and ends with its status; 125 if it did not get that far.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import vm

NOT_RUN = 125


def main() -> int:
    """Parse, boot, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, help="folder for junit.xml and logs (default: a new one in /tmp)"
    )
    parser.add_argument(
        "--limit", type=float, default=300, metavar="S", help="time limit of the command (default: 300)"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="set inside; repeatable"
    )
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    results = (arguments.results or Path(tempfile.mkdtemp(prefix="rdma-vm-"))).resolve()
    results.mkdir(parents=True, exist_ok=True)
    environment = dict(item.split("=", 1) for item in arguments.env)
    try:
        outcome = vm.run(
            arguments.command,
            results,
            limit_s=arguments.limit,
            environment=environment,
            progress=lambda text: print(text, end="", flush=True),
        )
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return NOT_RUN
    if outcome.status is None:
        print(outcome.explained(), file=sys.stderr)
        return NOT_RUN
    print(f"[guest: {outcome.wall_s:.0f} s, status {outcome.status}, results in {results}]", file=sys.stderr)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())

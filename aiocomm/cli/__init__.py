"""The `aiocomm` command. Each subcommand is a module with `add_arguments(parser)` and `main(args) -> int`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Final

from aiocomm.cli._streams import OutputLost, guarded

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

# name: (module, help). Modules are imported when their command is used.
_COMMANDS: Final = {
    "run": ("aiocomm.cli.run", "start processes of one world on this host"),
    "demo": ("aiocomm.cli.demo", "prefill and decode in two processes, with real tensors between them"),
    "doctor": ("aiocomm.cli.doctor", "what this machine can do per link, why not, and what to install"),
    "bench": ("aiocomm_bench.cli", "measure, beside the peers that are installed"),
    "rendezvous": ("aiocomm.cli.rendezvous", "the meeting point of an elastic world"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    130 after Ctrl-C; 141 once nobody reads the output any more; 1, and a sentence, if it cannot be written.
    """
    try:
        with guarded():
            return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OutputLost as lost:
        if lost.broken:
            return 128 + signal.SIGPIPE
        with contextlib.suppress(OSError):
            os.write(2, f"aiocomm: {lost}\n".encode())
        return 1


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="aiocomm", description="Awaitable communication between processes, for LLM serving."
    )
    parser.add_argument("--version", action="version", version=f"aiocomm {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    subs = {}
    for name, (module, text) in _COMMANDS.items():
        subs[name] = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:
            importlib.import_module(module).add_arguments(subs[name])
    args, further = parser.parse_known_args(arguments)
    if further:  # told with the usage of the command, which argparse itself does not
        subs[args.command].error(f"unrecognized arguments: {' '.join(further)}")
    status = importlib.import_module(_COMMANDS[args.command][0]).main(args)
    return int(status or 0)


def _version() -> str:
    try:
        return metadata.version("aiocomm")
    except metadata.PackageNotFoundError:
        return "(not installed)"

"""`aiocomm rendezvous`: the meeting point of an elastic world, without a rank of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING

from aiocomm._control.address import parse
from aiocomm._control.hosting import Host
from aiocomm._log import EventLog
from aiocomm.config import Settings, resolve_world, unknown_variables
from aiocomm.errors import AiocommError

if TYPE_CHECKING:
    import argparse

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--listen",
        required=True,
        metavar="ADDRESS",
        help="tcp://host:port (port 0 for any), unix://@name, unix:///path or file:///path; "
        "TCP needs AIOCOMM_TOKEN or AIOCOMM_TOKEN_FILE",
    )


def main(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    try:
        return asyncio.run(_serve(args.listen))
    except AiocommError as error:
        print(f"aiocomm rendezvous: {error}", file=sys.stderr)
        return 2


async def _serve(listen: str) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
            loop.add_signal_handler(signum, stop.set)
    token = resolve_world(listen).token
    key = token.encode() if token is not None else None
    settings = Settings.from_environment()
    EventLog(settings.log_level).unknown(unknown_variables())
    host = Host(None, parse(listen), key, settings, host_rank=None)
    try:
        address, _ = await host.start(0.0)
        print(f"listening at {address}", flush=True)
        await stop.wait()
    finally:
        await host.aclose()
    return 0

"""What `aiocomm doctor`, the reference and the tests know of the link `uds`."""

from __future__ import annotations

import socket

from aiocomm.links import Capabilities, Check, Report, State
from aiocomm.links._report import is_built

__all__ = ["CAPABILITIES", "discover"]

CAPABILITIES = Capabilities(
    reach="processes of one host",
    memory="host",
    paths="eager, stream",
    wake="the socket",
    loss="the socket's end",
)


def discover() -> Report:
    """Make a pair of sockets."""
    try:
        for one in socket.socketpair():
            one.close()
    except OSError as error:
        check = Check("sockets", State.FAILED, str(error), "raise the limit of open files (ulimit -n)")
    else:
        check = Check("sockets", State.OK, "AF_UNIX")
    return Report("uds", built=is_built("uds"), summary="Unix sockets", checks=(check,))

"""RDMA: what this machine has for the verbs link. Whether this build carries the link is asked of it."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

from aiocomm.links._capabilities import Capabilities
from aiocomm.links._report import Check, Report, State, is_built, package_version, read_text

__all__ = ["CAPABILITIES", "discover"]

CAPABILITIES = Capabilities(
    reach="hosts on InfiniBand or RoCE",
    memory="host, GPU",
)

_DEVICES, _NODES = Path("/sys/class/infiniband"), Path("/dev/infiniband")


def discover() -> Report:
    """Look for the verbs library, devices and their ports, access to them, and the locked-memory limit."""
    ports = _ports()
    checks = (_library(), *ports, _access(), _memlock(), _packages())
    active = sum(check.state is State.OK for check in ports)
    machine = f"the machine has {active} active port(s)" if active else "the machine has no active port"
    return Report("rdma", built=is_built("rdma"), summary=machine, checks=checks)


def _library() -> Check:
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        advice = "install rdma-core (Debian, Ubuntu: apt install libibverbs1 ibverbs-providers)"
        return Check("verbs library", State.FAILED, "libibverbs.so.1 does not load", advice)
    return Check("verbs library", State.OK, "libibverbs.so.1")


def _ports() -> list[Check]:
    checks = []
    for port in sorted(_DEVICES.glob("*/ports/*")):
        state = (read_text(port / "state") or "unknown").partition(": ")[2]
        rate, layer = read_text(port / "rate") or "rate unknown", read_text(port / "link_layer") or "unknown"
        up = state == "ACTIVE"
        advice = "" if up else "plug the cable, bring the interface up, or start the subnet manager"
        name = f"device {port.parts[-3]} port {port.name}"
        checks.append(Check(name, State.OK if up else State.FAILED, f"{state}, {layer}, {rate}", advice))
    if not checks:
        advice = (
            "soft-RoCE serves for trying: rdma link add rxe0 type rxe netdev eth0 (kernel module rdma_rxe)"
        )
        checks.append(Check("devices", State.FAILED, "none in /sys/class/infiniband", advice))
    return checks


def _access() -> Check:
    nodes = sorted(_NODES.glob("uverbs*"))
    if not nodes:
        return Check("device files", State.INFO, "no /dev/infiniband/uverbs*")
    refused = [str(node) for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if refused:
        advice = "give this user read and write access; in a container: --device /dev/infiniband"
        return Check("device files", State.FAILED, f"no access to {', '.join(refused)}", advice)
    return Check("device files", State.OK, f"{len(nodes)} accessible")


def _memlock() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("locked memory", State.OK, "unlimited")
    advice = "registered memory is locked: ulimit -l unlimited, or memlock in /etc/security/limits.conf"
    return Check("locked memory", State.LIMITED, f"{soft / 2**20:g} MiB", advice)


def _packages() -> Check:
    version = package_version("pyverbs")
    advice = "" if version else "once the link exists: pip install 'aiocomm[rdma]'"
    return Check("packages", State.INFO, f"pyverbs {version}" if version else "no pyverbs", advice)

"""TCP: whether this machine connects to itself, by which interfaces others reach it, buffer limits, TLS."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import socket

from aiocomm._control.interfaces import addresses_of
from aiocomm.links._capabilities import Capabilities
from aiocomm.links._report import Check, Report, State, is_built, read_text

__all__ = ["CAPABILITIES", "discover"]

CAPABILITIES = Capabilities(
    reach="any two hosts",
    memory="host",
    paths="eager, stream",
    wake="the socket",
    loss="the connection's end, or three missing heartbeats",
    encryption="TLS, by certificates of both ends",
)

_TIMEOUT_S = 5.0


def discover() -> Report:
    """Connect over loopback; list interfaces; read limits; look for a TLS library."""
    interfaces = _interfaces()
    checks = (_loopback(), *interfaces, _buffers(), _tls())
    outside = [check.name.removeprefix("interface ") for check in interfaces if check.state is State.OK]
    summary = (
        f"this host and, by {', '.join(outside)}, others" if outside else "this host only: no interface is up"
    )
    if checks[0].state is State.FAILED:
        summary = "sockets do not connect"
    return Report("tcp", built=is_built("tcp"), summary=summary, checks=checks)


def _loopback() -> Check:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), _TIMEOUT_S) as client,
        ):
            server.settimeout(_TIMEOUT_S)
            accepted, _ = server.accept()
            with accepted:
                client.sendall(b"x")
                accepted.settimeout(_TIMEOUT_S)
                if accepted.recv(1) != b"x":
                    raise ConnectionResetError("loopback lost a byte")
    except OSError as error:
        advice = "bring the loopback interface up: ip link set lo up; or look for a firewall rule"
        return Check("loopback", State.FAILED, str(error), advice)
    return Check("loopback", State.OK, "connected to 127.0.0.1")


def _interfaces() -> list[Check]:
    found = []
    for _, name in socket.if_nameindex():
        state = read_text(f"/sys/class/net/{name}/operstate") or "unknown"
        addresses = addresses_of(name)
        if name == "lo" or (state != "up" and not addresses):
            continue
        speed = read_text(f"/sys/class/net/{name}/speed") or ""  # megabits; -1 or refused where it has none
        rate = f"{int(speed) / 1000:g} Gbit/s" if speed.isdigit() else "speed unknown"
        mtu = read_text(f"/sys/class/net/{name}/mtu")
        detail = f"{state}, {', '.join(addresses) or 'no address'}, {rate}, MTU {mtu}"
        reachable = bool(addresses) and state in (
            "up",
            "unknown",
        )  # tunnels and some virtual ones say unknown
        found.append(Check(f"interface {name}", State.OK if reachable else State.INFO, detail))
    return found


def _buffers() -> Check:
    limits = []
    for name in ("rmem", "wmem"):
        most = (read_text(f"/proc/sys/net/ipv4/tcp_{name}") or "0 0 0").split()[-1]
        fixed = read_text(f"/proc/sys/net/core/{name}_max") or "0"
        limits.append((name, int(most), int(fixed)))
    detail = "; ".join(
        f"tcp_{name} up to {_mib(most)}, {name}_max {_mib(fixed)}" for name, most, fixed in limits
    )
    if min(most for _, most, _ in limits) < 4 << 20:
        advice = "for fast networks: sysctl net.ipv4.tcp_rmem='4096 131072 16777216', and tcp_wmem alike"
        return Check("socket buffers", State.LIMITED, detail, advice)
    return Check("socket buffers", State.INFO, detail)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.3g} MiB"


def _tls() -> Check:
    for name in ("libssl.so.3", "libssl.so.1.1", ctypes.util.find_library("ssl")):
        if name:
            with contextlib.suppress(OSError):
                ctypes.CDLL(name)
                return Check("TLS library", State.OK, name)
    advice = "install OpenSSL 3 (Debian, Ubuntu: apt install libssl3) to encrypt between hosts"
    return Check("TLS library", State.LIMITED, "no libssl: connections cannot be encrypted", advice)

"""The addresses of this host's network interfaces, and which of them others most likely reach."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path
from typing import Final

__all__ = ["addresses_of", "outward_address", "outward_addresses"]

_SIOCGIFADDR: Final = 0x8915
_CLASS: Final = Path("/sys/class/net")
_MOST: Final = 12
"""Addresses that others are told of: more than any host has good ones, less than a card may hold."""


def addresses_of(name: str) -> list[str]:
    """An interface's IPv4 address and its IPv6 ones that other hosts can use."""
    addresses = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        packed = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        addresses.append(socket.inet_ntoa(packed[20:24]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, device = line.split()
            address = ipaddress.IPv6Address(int(digits, 16))
            if device == name and not address.is_link_local:
                addresses.append(str(address))
    return addresses


def outward_addresses() -> tuple[str, ...]:
    """Numeric addresses by which other hosts may reach this one, the likeliest first; none if no interface
    is up.

    Which network the others are on cannot be known here, and hosts without a default route are as usual as
    those whose default route leads elsewhere: so all are told, and who dials finds the one that works.
    """
    found = [_routed(socket.AF_INET, "192.0.2.1"), _routed(socket.AF_INET6, "2001:db8::1")]
    with contextlib.suppress(OSError):
        # Bridges are mostly those of containers and virtual machines on this host.
        names = [name for _, name in socket.if_nameindex() if name != "lo" and _is_up(name)]
        for name in sorted(names, key=lambda name: (_CLASS / name / "bridge").exists()):
            found += addresses_of(name)
    return tuple(
        dict.fromkeys(
            address for address in found if address and not ipaddress.ip_address(address).is_loopback
        )
    )[:_MOST]


def outward_address() -> str:
    """The numeric address by which other hosts most likely reach this one; loopback if there is none."""
    return next(iter(outward_addresses()), "127.0.0.1")


def _routed(family: int, target: str) -> str:
    """This host's address on the way to a target, empty without a way."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing: only asks the routing table
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _is_up(name: str) -> bool:
    try:
        return (_CLASS / name / "operstate").read_text().strip() in ("up", "unknown")
    except OSError:
        return True

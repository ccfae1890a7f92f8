"""Addresses as users write them. Pure.

| form | meaning |
|---|---|
| `tcp://host:port`, `tcp://[v6]:port` | a TCP port; `*` or `0.0.0.0` listens on all interfaces |
| `tcp://[fe80::1%eth0]:port` | one on a link that has no other addresses, by this host's interface to it |
| `unix:///path`, `unix://@name` | a Unix socket, in the file system or abstract (nothing is left behind) |
| `file:///path` | a file on a shared file system, into which rank 0 writes its address |
| `env://` | what the launcher says: see `aiocomm.config` |
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from aiocomm.errors import UsageError

__all__ = ["Address", "EnvAddress", "FileAddress", "TcpAddress", "UnixAddress", "parse"]

_MAX_UNIX: Final = 107  # sun_path less its terminator; one more byte goes to the abstract marker


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, by name or number, and a port. `host` is empty for all interfaces.

    An IPv6 address of one link (fe80::…) has a meaning only with an interface, `fe80::1%eth0`, and each host
    has names of its own for those: what is told to others is `bare`, and they add their own.
    """

    host: str
    port: int

    @property
    def is_literal(self) -> bool:
        """Whether `host` is a number rather than a name."""
        try:
            ipaddress.ip_address(self.host.partition("%")[0])
        except ValueError:
            return False
        return True

    @property
    def is_link_local(self) -> bool:
        """Whether this is an IPv6 address of one link."""
        return self.is_literal and ":" in self.host and ipaddress.IPv6Address(self.host).is_link_local

    @property
    def interface(self) -> str:
        """The interface of this host whose link is meant, empty if none is given."""
        return self.host.partition("%")[2]

    @property
    def bare(self) -> TcpAddress:
        """Without the interface."""
        return replace(self, host=self.host.partition("%")[0])

    def on(self, interface: str) -> TcpAddress:
        """What another host has told, on this host's interface to the link (empty: it is not known)."""
        return (
            replace(self.bare, host=f"{self.bare.host}%{interface}")
            if self.is_link_local and interface
            else self
        )

    @property
    def is_wildcard(self) -> bool:
        """Whether this listens on all interfaces."""
        return self.host in ("", "0.0.0.0", "::")

    @property
    def is_exact(self) -> bool:
        """Whether this is one address of one interface, and no other of the same host is meant."""
        return self.host == "localhost" or (self.is_literal and not self.is_wildcard)

    def __str__(self) -> str:
        host = self.host or "*"
        return f"tcp://[{host}]:{self.port}" if ":" in host else f"tcp://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix socket; `path` starts with `@` where it is abstract."""

    path: str

    @property
    def is_abstract(self) -> bool:
        """Whether the name lives in the network namespace instead of the file system."""
        return self.path.startswith("@")

    @property
    def sockaddr(self) -> str:
        """What `socket.bind` and `connect` take."""
        return "\0" + self.path[1:] if self.is_abstract else self.path

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True, slots=True)
class FileAddress:
    """A file that holds the address."""

    path: str

    def __str__(self) -> str:
        return f"file://{self.path}"


@dataclass(frozen=True, slots=True)
class EnvAddress:
    """The launcher's environment."""

    def __str__(self) -> str:
        return "env://"


Address: TypeAlias = TcpAddress | UnixAddress | FileAddress | EnvAddress


def parse(text: str) -> Address:
    """The address that `text` stands for.

    Raises:
        UsageError: it stands for none; the message says what is wrong.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise UsageError(
            f"{text!r} is no address; write tcp://host:port, unix://@name, unix:///path or file:///path"
        )
    if "\0" in rest:
        raise UsageError(f"the address {text!r} contains a zero byte")
    match scheme:
        case "tcp":
            return _parse_tcp(text, rest)
        case "unix":
            if not rest or rest == "@":
                raise UsageError(f"the address {text!r} lacks a path (unix:///path) or a name (unix://@name)")
            if len(os.fsencode(rest)) > _MAX_UNIX:
                raise UsageError(f"the Unix socket address {text!r} is longer than {_MAX_UNIX} bytes")
            return UnixAddress(rest)
        case "file":
            if not rest.startswith("/"):
                raise UsageError(f"the address {text!r} needs an absolute path: file:///path")
            return FileAddress(rest)
        case "env":
            if rest:
                raise UsageError(f"nothing may follow env:// (got {text!r})")
            return EnvAddress()
    raise UsageError(f"unknown kind of address {scheme!r} in {text!r}; known: tcp, unix, file, env")


def _parse_tcp(text: str, rest: str) -> TcpAddress:
    if rest.startswith("["):
        host, closed, port_text = rest[1:].partition("]:")
        if not closed:
            raise UsageError(f"the address {text!r} lacks a port: tcp://[host]:port")
        try:
            ipaddress.IPv6Address(host)
        except ValueError as error:
            raise UsageError(f"{host!r} in {text!r} is not an IPv6 address") from error
    else:
        host, colon, port_text = rest.rpartition(":")
        if not colon:
            raise UsageError(f"the address {text!r} lacks a port: tcp://host:port")
        if ":" in host:
            raise UsageError(f"write an IPv6 address in brackets: tcp://[{host}]:{port_text}")
        if not host:
            raise UsageError(f"the address {text!r} lacks a host; tcp://*:port listens on all interfaces")
        if any(character.isspace() or character in "/@?#" for character in host) or not _is_name(host):
            raise UsageError(f"{host!r} in {text!r} is not a host")
    if not (port_text.isascii() and port_text.isdigit() and int(port_text[:6]) <= 65535):
        raise UsageError(f"{port_text!r} in {text!r} is not a port (0 to 65535)")
    return TcpAddress("" if host == "*" else host, int(port_text))


def _is_name(host: str) -> bool:
    """Whether a resolver could be asked: it refuses empty labels, and those of more than 63 bytes."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False

"""Hosts made of network namespaces, joined by a bridge in one of their own, and processes on them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Hosts", "hosts"]


class Hosts:
    """Host k (from 0) has the address 10.213.8.k+1 on eth0, no default route, and the name of each.

    Args:
        count: of hosts.
        folder: for the files that name them.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.names = [f"aiocomm-{os.getpid()}-h{k}" for k in range(count)]
        self.addresses = [f"10.213.8.{k + 1}" for k in range(count)]
        self.table = folder / "hosts"
        self.name({f"gpu{k}": [address] for k, address in enumerate(self.addresses)})

    def name(self, table: dict[str, list[str]]) -> None:
        """What names stand for, on all hosts."""
        lines = [f"{address} {name}" for name, addresses in table.items() for address in addresses]
        self.table.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

    def ip(self, host: int, *arguments: str) -> None:
        """Run ip(8) on a host."""
        _run("ip", "-n", self.names[host], *arguments)

    def drop(self, host: int, rule: str) -> None:
        """Let a host's firewall drop, silently, the connections to it that a rule of nft(8) names."""
        rule = f"{rule} tcp flags & (syn | ack) == syn drop"
        text = f"table inet t {{ chain i {{ type filter hook input priority 0; {rule}; }}; }}"
        _run("ip", "netns", "exec", self.names[host], "nft", text)

    def at(self, host: int, *command: str) -> list[str]:
        """A command as it is run there."""
        # Its own /etc/hosts, as `ip netns` gives those in /etc/netns, without touching that folder.
        mount = f'mount --bind {self.table} /etc/hosts && exec "$@"'
        inside = ["unshare", "-m", "sh", "-c", mount, "-", *command]
        return ["ip", "netns", "exec", self.names[host], *inside]

    def start(self, host: int, *command: str, **env: str) -> subprocess.Popen[str]:
        """A Python process there."""
        return subprocess.Popen(
            self.at(host, sys.executable, "-P", *command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "AIOCOMM_TOKEN": "secret", **env},
        )


@contextlib.contextmanager
def hosts(count: int, folder: Path) -> Iterator[Hosts]:
    """So many hosts for the time of a block; skips where they cannot be had."""
    if os.getuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nft"))):
        pytest.skip("needs root, ip, unshare and nft to make network namespaces")
    made = Hosts(count, folder)
    switch = f"aiocomm-{os.getpid()}-sw"
    try:
        try:
            _run("ip", "netns", "add", switch)
            _run("ip", "-n", switch, "link", "add", "bridge0", "up", "type", "bridge")
            for k, (name, address) in enumerate(zip(made.names, made.addresses, strict=True)):
                _run("ip", "netns", "add", name)
                made.ip(k, "link", "set", "lo", "up")
                made.ip(k, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{k}", "netns", switch)
                _run("ip", "-n", switch, "link", "set", f"p{k}", "master", "bridge0", "up")
                made.ip(k, "address", "add", f"{address}/24", "dev", "eth0")
                made.ip(k, "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot make network namespaces: {error.stderr.strip()}")
        yield made
    finally:
        for name in (switch, *made.names):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)

"""Being the one that listens: a rendezvous at an address of any kind."""

from __future__ import annotations

import resource
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from aiocomm._control import interfaces
from aiocomm._control.address import Address, EnvAddress, FileAddress, TcpAddress, UnixAddress
from aiocomm._control.client import remove_address_file, write_address_file
from aiocomm._control.host import STILL_LOOKED_UP, look_up
from aiocomm._control.rendezvous import Rendezvous
from aiocomm.errors import LinkError, UsageError

if TYPE_CHECKING:
    from aiocomm.config import Settings

__all__ = ["Host", "allow_descriptors"]

_OTHER_DESCRIPTORS: Final = 128
"""Of a process besides the control connections of the members that it hosts."""
_MANY: Final = 256
"""Members from which on the limit is looked at: fewer fit into any usual one."""


def allow_descriptors(members: int) -> None:
    """See to it that this process may open a connection for each member, raising its soft limit if need be.

    Past the limit a member would wait at the door until its time is over, and nothing would say why.

    Raises:
        UsageError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # One for its connection, and on one host one that tells of its death.
    wanted, needed = 2 * members + _OTHER_DESCRIPTORS, members + _OTHER_DESCRIPTORS
    if members < _MANY or soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if possible < needed:
        raise UsageError(
            f"rank 0 of {members} processes needs {needed} open files, but may have {hard}: raise the hard "
            f"limit (ulimit -Hn, LimitNOFILE= in a unit, --ulimit nofile= for a container)"
        )
    if possible > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))


class Host:
    """A rendezvous and how it is found.

    Args:
        size: ranks of a fixed world, None for an elastic one.
        address: where to listen; a file gets a TCP address and, if the group has no token, a fresh one.
        key: the group's token, or None.
        settings: limits and intervals.
        host_rank: rank of the member in this process, None if there is none.
    """

    def __init__(
        self, size: int | None, address: Address, key: bytes | None, settings: Settings, host_rank: int | None
    ) -> None:
        self._address = address
        self._settings = settings
        self._fresh = (
            secrets.token_hex(32).encode() if key is None and isinstance(address, FileAddress) else None
        )
        self._key = key if key is not None else self._fresh
        self._published: tuple[str, TcpAddress | UnixAddress] | None = None
        self._near: TcpAddress | UnixAddress | None = None
        self.rendezvous = Rendezvous(size, self._key, settings, host_rank)

    async def start(self, timeout_s: float) -> tuple[TcpAddress | UnixAddress, bytes | None]:
        """Listen, and publish where. Returns the address that members can reach, and the key.

        Args:
            timeout_s: seconds to wait for an address that is still taken.

        Raises:
            UsageError: the address would need a token, or this process may not open so many connections.
            LinkError: it cannot be had.
        """
        address = self._address
        if isinstance(address, EnvAddress):
            raise UsageError("env:// says where others listen, not where to listen")
        if self.rendezvous.members.size is not None:
            allow_descriptors(self.rendezvous.members.size)
        wanted = TcpAddress("", 0) if isinstance(address, FileAddress) else address
        bound = self._near = await self.rendezvous.listen(wanted, timeout_s)
        found: list[TcpAddress | UnixAddress] = [bound]
        if isinstance(bound, TcpAddress) and not bound.is_exact:
            own = interfaces.outward_addresses()
            hosts = (self._settings.host,) if self._settings.host else own or ("127.0.0.1",)
            found = [replace(bound, host=host) for host in hosts]
            self._near = replace(bound, host=await _own_address(bound, own))
        if isinstance(address, FileAddress):
            try:
                told = [one.bare if isinstance(one, TcpAddress) else one for one in found]
                write_address_file(address.path, told, self._fresh)
            except OSError as error:
                who = self.rendezvous.who
                raise LinkError(f"{who} cannot write {address}: {error}", error.errno) from error
            self._published = (address.path, told[0])
        return found[0], self._key

    @property
    def near(self) -> TcpAddress | UnixAddress:
        """Where this process's own member finds the rendezvous, whatever others have to dial. Only after
        `start`.
        """
        assert self._near is not None
        return self._near

    @property
    def trouble(self) -> str:
        """Why `start` has not come to its end yet."""
        return "its address is taken" if self._near is None else STILL_LOOKED_UP.format("the address")

    async def aclose(self) -> None:
        """Take the address back, tell the members, close."""
        if self._published is not None:
            remove_address_file(*self._published)
            self._published = None
        await self.rendezvous.aclose()


async def _own_address(bound: TcpAddress, own: tuple[str, ...]) -> str:
    """Of a socket on all interfaces, the address that its name means if that is one of this host; else
    loopback, since a name may stand for a load balancer, or be unknown here.
    """
    if not bound.is_wildcard:
        found = await look_up(bound.host, "the world's address")
        return next((address for address in found if address in own), "127.0.0.1")
    return "127.0.0.1"

"""Hosts whose addresses cannot be told from a default route, or of which some do not answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fault.hosts import Hosts, hosts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PORT = 7100
MEMBER = """
import asyncio, sys
import aiocomm

async def main(address, rank, size, caller):
    async with aiocomm.connect(address, rank=rank, size=size, deadline=20) as comm:
        if rank == caller:
            for peer in comm.peers:
                await comm.send(bytes(8), peer.rank, synchronous=True, deadline=20)
        else:
            await comm.recv(bytearray(8), aiocomm.ANY_SOURCE, deadline=30)  # which calls nobody
        print("ok", flush=True)

asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))
"""


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Hosts]:
    with hosts(2, tmp_path) as made:
        yield made


def meet(
    two: Hosts, addresses: list[str], places: list[int], caller: int, own: tuple[str, ...] = ()
) -> list[str]:
    """What members say that meet at the addresses, each on the host given; `own`: AIOCOMM_HOST of those."""
    size = str(len(places))
    processes = [
        two.start(
            place,
            *("-c", MEMBER, address, str(rank), size, str(caller)),
            **({"AIOCOMM_HOST": own[place]} if own else {}),
        )
        for rank, (place, address) in enumerate(zip(places, addresses, strict=True))
    ]
    try:
        return [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("default", ["no default route", "default route elsewhere"])
@pytest.mark.parametrize("kind", ["name", "loopback name", "wildcard", "file"])
def test_rank_zero_is_reached_however_it_listens(two: Hosts, kind: str, default: str, tmp_path: Path) -> None:
    if default == "default route elsewhere":
        two.ip(0, "link", "add", "eth1", "type", "veth", "peer", "name", "eth2")
        two.ip(0, "address", "add", "10.213.9.1/24", "dev", "eth1")
        for device in ("eth1", "eth2"):
            two.ip(0, "link", "set", device, "up")
        two.ip(0, "route", "add", "default", "dev", "eth1")
    here = there = f"tcp://gpu0:{PORT}"
    if kind == "wildcard":
        here = f"tcp://*:{PORT}"
    elif kind == "file":
        here = there = f"file://{tmp_path}/address"
    elif kind == "loopback name":  # as Debian has it for the host's own name
        here = f"tcp://self:{PORT}"
        two.name({"self": ["127.0.1.1"], "gpu0": [two.addresses[0]]})
    # Rank 1 is beside rank 0, and has no other way of knowing its address either.
    assert meet(two, [here, here, there], [0, 0, 1], caller=2) == ["ok\n"] * 3


def test_a_name_is_got_past_its_address_that_does_not_answer(two: Hosts) -> None:
    silent = "10.213.8.3"  # has more bits in common with host 1 than the other, and so is tried first
    two.ip(0, "address", "add", f"{silent}/24", "dev", "eth0")
    two.name({"gpu0": [silent, two.addresses[0]]})
    two.drop(0, f"ip daddr {silent}")
    addresses = [f"tcp://{two.addresses[0]}:{PORT}", f"tcp://gpu0:{PORT}"]
    assert meet(two, addresses, [0, 1], caller=1) == ["ok\n"] * 2


@pytest.fixture
def link(two: Hosts) -> Hosts:
    """Hosts with no addresses but those of the link between them, whose interfaces differ in their names."""
    for k, name in enumerate(("eth0", "net1")):
        two.ip(k, "link", "set", "eth0", "down")
        two.ip(k, "address", "flush", "dev", "eth0")
        two.ip(k, "link", "set", "eth0", "name", name, "up")
        two.ip(k, "address", "add", f"fe80::a{k}/64", "dev", name, "nodad")
    return two


@pytest.mark.parametrize("caller", [0, 2])
@pytest.mark.parametrize("kind", ["address", "file"])
def test_hosts_meet_that_have_only_the_addresses_of_a_link(
    link: Hosts, kind: str, caller: int, tmp_path: Path
) -> None:
    """What is told of one is without its interface: that of the other host has another name."""
    here, there = f"tcp://[fe80::a0%eth0]:{PORT}", f"tcp://[fe80::a0%net1]:{PORT}"
    own: tuple[str, ...] = ()
    if kind == "file":  # which holds all addresses but these, unless one is given
        here = there = f"file://{tmp_path}/address"
        own = ("fe80::a0%eth0", "fe80::a1%net1")
    assert meet(link, [here, here, there], [0, 0, 1], caller, own) == ["ok\n"] * 3


@pytest.mark.parametrize(
    ("address", "rank", "says"),
    [
        (
            "tcp://[fe80::a0]:{port}",
            0,
            "Invalid argument; an address of one link needs this host's interface",
        ),
        ("tcp://[fe80::a0%eth9]:{port}", 0, "No such device; this host has no such interface"),
        (
            "tcp://[fe80::a0]:{port}",
            1,
            "it is not known by which interface of this host: write [fe80::a0%eth0]",
        ),
    ],
)
def test_an_address_of_a_link_without_its_interface_is_told(
    link: Hosts, address: str, rank: int, says: str
) -> None:
    asks = link.start(0, "-c", SILENT, address.format(port=PORT), str(rank))
    assert says in asks.communicate(timeout=60)[0]


SILENT = """
import asyncio, sys
import aiocomm

async def main(address, rank):
    try:
        await aiocomm.connect(address, rank=rank, size=2, deadline=5)
    except (aiocomm.DeadlineExceeded, aiocomm.LinkError) as error:
        print(error, flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""
LONE_SENDER = """
import asyncio, sys
import aiocomm

async def main(address, rank):
    async with aiocomm.connect(address, rank=rank, size=2, deadline=20) as comm:
        if rank == 1:
            try:
                await comm.send(bytes(8), 0, synchronous=True)
            except aiocomm.PeerLostError as error:
                print(error, comm.peers[0].alive, flush=True)
        sys.stdin.read()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def test_a_peer_behind_a_firewall_is_not_told_to_be_gone(two: Hosts) -> None:
    two.drop(0, f"tcp dport != {PORT}")
    address = f"tcp://{two.addresses[0]}:{PORT}"
    processes = [
        two.start(k, "-c", LONE_SENDER, address, str(k), AIOCOMM_HANDSHAKE_TIMEOUT_S="4") for k in range(2)
    ]
    try:
        assert processes[1].stdout is not None
        said = processes[1].stdout.readline()
        assert "no connection with rank 0 (" in said, said
        assert f"no answer from tcp://{two.addresses[0]}:" in said, said
        assert said.endswith("; the next operation tries again True\n"), said
        assert "gone" not in said, said
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_rendezvous_behind_a_firewall_is_told_to_be_silent(two: Hosts) -> None:
    two.drop(0, f"tcp dport {PORT}")
    silent = two.start(1, "-c", SILENT, f"tcp://{two.addresses[0]}:{PORT}", "1")
    said, _ = silent.communicate(timeout=60)
    assert f"no answer from tcp://{two.addresses[0]}:{PORT}: is a firewall between" in said

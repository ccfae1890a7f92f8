"""An elastic world in which processes come, leave and are killed while others move data."""

from __future__ import annotations

import asyncio
import secrets
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from harness import LIMIT_S, until

import aiocomm
from aiocomm._control.client import Client
from aiocomm._control.rendezvous import Rendezvous
from aiocomm.types import Peer

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Child

pytestmark = pytest.mark.anyio

NBYTES = 1 << 20

GUEST = """
import asyncio
import numpy as np
import aiocomm

async def main():
    async with aiocomm.connect() as comm:
        while True:
            await asyncio.gather(comm.send(np.full(1 << 20, comm.rank, "u1"), 0), comm.recv_array(0))

asyncio.run(main())
"""

HOST = """
import asyncio
import aiocomm

async def main():
    async with aiocomm.connect(rank=0) as comm:
        await comm.recv_array()
        input()

asyncio.run(main())
"""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Two loops: processes take their time to start."""
    return str(request.param)


async def test_members_come_and_go_under_transfers(child: Callable[..., Child]) -> None:
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    host = await aiocomm.connect(address, rank=0)
    peer = await aiocomm.connect(address)
    await until(lambda: host.peers)
    events = host.events()
    turns, over = 0, False

    async def move() -> None:
        """The pair that stays, all the while."""
        nonlocal turns
        out, into = [np.zeros(NBYTES, np.uint8) for _ in range(2)], np.zeros(NBYTES, np.uint8)
        while not over:
            out[0].fill(turns % 251)
            sending = host.send(out[0], peer.rank)
            await peer.recv(into, 0)
            await sending
            assert (into == turns % 251).all()
            turns += 1

    async def answer() -> None:
        """Talk to whoever is in the world, from rank 0."""
        got = np.zeros(NBYTES, np.uint8)
        while not over:
            try:
                source = (await host.recv(got, tag=0)).source
                assert (got == source).all()
                await host.send(got, source)
            except aiocomm.PeerLostError:
                continue  # it has gone in between

    async with anyio.create_task_group() as group:
        group.start_soon(move)
        group.start_soon(answer)
        guests = [child(GUEST, AIOCOMM_ADDRESS=address) for _ in range(2)]
        for _ in range(4):
            member = await aiocomm.connect(address)
            before = turns
            out = np.full(NBYTES, member.rank, np.uint8)
            sending = member.send(out, 0)
            assert (await member.recv_array(0) == out).all()
            await sending
            await until(lambda before=before: turns > before)  # type: ignore[misc]
            await member.aclose()
        joined: dict[int, str] = {}
        lost: dict[int, str] = {}
        killed = False
        async for event in events:
            if isinstance(event, aiocomm.PeerJoined):
                guest = event.peer.pid in {one.pid for one in guests}
                joined[event.peer.rank] = "guest" if guest else "member"
            elif isinstance(event, aiocomm.PeerLost):
                lost[event.rank] = event.reason
            if not killed and list(joined.values()).count("guest") == 2:
                before, killed = turns, True
                await until(lambda before=before: turns > before)  # type: ignore[misc]
                for one in guests:
                    one.kill()
            if len(lost) == 6:
                break
        before = turns
        await until(lambda: turns > before)
        over = True
        group.cancel_scope.cancel()
    assert sorted(joined) == [2, 3, 4, 5, 6, 7]
    for rank, kind in joined.items():
        assert (lost[rank] == "left") == (kind == "member"), (rank, lost[rank])
    assert [other.rank for other in host.peers if other.alive] == [peer.rank]
    await peer.aclose()
    await host.aclose()


async def test_a_server_waits_for_its_next_client() -> None:
    """Although all whom it has ever known are gone."""
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    async with aiocomm.connect(address, rank=0) as server:
        waiting = server.recv_array(tag=1)
        events = server.events()
        for turn in range(3):
            async with aiocomm.connect(address) as client:
                await client.send(bytes([turn]), 0, tag=1)
            assert bytes(await waiting) == bytes([turn])
            waiting = server.recv_array(tag=1)
            async for event in events:
                if isinstance(event, aiocomm.PeerLost):
                    break
            assert not waiting.done()
        waiting.cancel()


@pytest.mark.parametrize("killed", [False, True])
async def test_nobody_can_join_a_world_without_its_rendezvous(
    killed: bool, child: Callable[..., Child]
) -> None:
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    host = child(HOST, AIOCOMM_ADDRESS=address)
    async with aiocomm.connect(address) as client:
        waiting = client.recv_array()
        await client.send(b"", 0)
        if killed:
            host.kill()
        else:
            host.tell("leave")
        with pytest.raises(aiocomm.PeerLostError):
            await waiting
        with pytest.raises(aiocomm.PeerLostError):
            await client.recv_array()


async def test_who_comes_before_rank_zero_has_joined_its_own_world_knows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 listens before it joins: it may stand still between the two."""
    admitted = threading.Event()
    join, admit = Client.join, Rendezvous._admit

    async def join_late(self: Client, make_card: Any) -> Any:
        if self._world.rank == 0:
            await asyncio.to_thread(admitted.wait, LIMIT_S)
        return await join(self, make_card)

    def admit_and_tell(self: Rendezvous, *arguments: Any) -> None:
        admit(self, *arguments)
        admitted.set()

    monkeypatch.setattr(Client, "join", join_late)
    monkeypatch.setattr(Rendezvous, "_admit", admit_and_tell)
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"

    async def host() -> None:
        async with aiocomm.connect(address, rank=0) as comm:
            assert bytes(await comm.recv_array(1)) == b"hello"

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(host)
            async with aiocomm.connect(address) as client:
                assert [peer.rank for peer in client.peers] == [0]
                await client.send(b"hello", 0)


async def test_a_peer_whose_end_is_told_before_its_coming_is_not_alive() -> None:
    """The two are told by different threads."""
    async with aiocomm.connect() as comm:
        first = Peer(3, "here", 1, (), ("shm",), True, None, 77)
        comm._on_event(aiocomm.PeerLost(3, 77, "its process ended"))
        comm._on_event(aiocomm.PeerJoined(first))
        assert [peer.alive for peer in comm.peers] == [False]
        comm._on_event(aiocomm.PeerJoined(replace(first, generation=78)))
        assert [(peer.alive, peer.generation) for peer in comm.peers] == [(True, 78)]
        comm._on_event(aiocomm.PeerLost(3, 77, "told once more"))
        assert [peer.alive for peer in comm.peers] == [True]


async def test_a_message_of_a_peer_may_be_sooner_than_the_word_that_it_has_come() -> None:
    """They come by different threads: what names the peer meanwhile waits for nothing, and is not refused."""
    async with aiocomm.connect() as comm:
        comm._on_control_event(aiocomm.PeerJoined(Peer(3, "here", 1, (), ("shm",), True, None, 77)))
        assert not comm.peers
        receive = comm.recv(bytearray(1), 3)
        assert [peer.rank for peer in comm.peers] == [3]
        with pytest.raises(aiocomm.PeerLostError):  # the engine has not heard of it at all
            await receive
        with pytest.raises(aiocomm.UsageError, match="no rank 4 in this world: ranks are 0 to 3"):
            await comm.send(b"", 4)


async def test_a_rank_that_was_gone_before_this_process_came_is_lost_to_it() -> None:
    """Nothing is known of it, not even that it has been: every call names it as lost all the same."""
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    async with aiocomm.connect(address, rank=0) as host:
        async with aiocomm.connect(address) as first:
            region = first.register(bytearray(4)).handle
            pages = (await first.lease_pages(aiocomm.Pages(np.zeros((4, 8))))).handle
        await until(lambda: not any(peer.alive for peer in host.peers))
        async with aiocomm.connect(address) as late:
            assert [peer.rank for peer in late.peers] == [0]
            own = late.register(bytearray(4))
            lease = await late.lease_pages(aiocomm.Pages(np.zeros((4, 8))))

            async def layers() -> None:
                async for _ in lease.layers(1):
                    pass

            for call in (
                lambda: late.send(b"x", 1),
                lambda: late.recv(bytearray(1), 1),
                lambda: late.recv_array(1),
                lambda: late.exchange(own, 1),
                lambda: late.group([0, 1, late.rank]),
                layers,
            ):
                with pytest.raises(aiocomm.PeerLostError) as raised:
                    await call()  # type: ignore[no-untyped-call]
                assert raised.value.peer == 1
            with pytest.raises(aiocomm.PeerLostError):
                late.remote(region)
            with pytest.raises(aiocomm.PeerLostError):
                late.remote_pages(pages)
            assert not list(late._scopes)  # nor was anything opened for the group
            with pytest.raises(aiocomm.UsageError, match="no rank 3"):
                await late.group([3, late.rank])

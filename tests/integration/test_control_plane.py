"""Control planes over an engine that only records: worlds, pairs, deaths, refusals."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import pytest
from harness import reserved_port

from aiocomm._control import messages
from aiocomm._control.address import UnixAddress, parse
from aiocomm._control.auth import Seal
from aiocomm._control.hosting import Host
from aiocomm._control.listener import Listener, bind
from aiocomm._control.liveness import ProcessWatch
from aiocomm._control.loopthread import LoopThread
from aiocomm._control.rendezvous import Rendezvous
from aiocomm._control.stream import Stream
from aiocomm._control.testing import Member, RecordingEngine
from aiocomm._control.vigil import Vigil
from aiocomm._process import fresh_address
from aiocomm.config import Settings
from aiocomm.errors import AuthenticationError, DeadlineExceeded, LinkError, UsageError
from aiocomm.types import Fallback, LinkDown, PeerJoined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from aiocomm._control.plane import ControlPlane

    Condition = Callable[[ControlPlane], object]

PATIENCE_S = 30.0
TCP_ONLY = {"tcp": ("tcp", 3)}


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    yield
    assert set(threading.enumerate()) <= threads
    assert set(os.listdir("/proc/self/fd")) <= descriptors


@pytest.fixture
def members() -> Iterator[Callable[..., Member]]:
    """Makes members, and closes them in the reverse order."""
    with contextlib.ExitStack() as stack:

        def make(*arguments: Any, **options: Any) -> Member:
            member = Member(*arguments, **options)
            stack.callback(member.close)
            return member

        yield make


@pytest.fixture
def processes() -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], int, int]]]:
    """Starts members in processes of their own; gives process, rank and generation once they have joined."""
    with contextlib.ExitStack() as stack:

        def start(address: str, rank: object = "-", size: object = "-", wait: bool = True) -> Any:
            process = subprocess.Popen(
                [sys.executable, "-m", "aiocomm._control.testing", address, str(rank), str(size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return (process, *ready(process)) if wait else process

        yield start


def ready(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    assert process.stdout is not None
    word, rank, generation = process.stdout.readline().split()
    assert word == b"ready"
    return int(rank), int(generation)


@pytest.fixture
def port() -> Iterator[Callable[..., int]]:
    """Gives ports that are ours until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda *where: stack.enter_context(reserved_port(*where))


@pytest.fixture
def time_is_over(monkeypatch: pytest.MonkeyPatch) -> Callable[[Member, Condition], None]:
    """Ends the time that a member has to join, once something is so."""
    limits: dict[asyncio.Task[Any] | None, asyncio.Timeout] = {}
    timeout = asyncio.timeout

    def noted(delay: float | None) -> asyncio.Timeout:
        limit = timeout(delay)
        limits.setdefault(asyncio.current_task(), limit)  # the first of the task that joins is the whole time
        return limit

    def end(member: Member, once: Condition) -> None:
        plane = member.plane

        def look() -> None:
            if once(plane):
                limits[plane._starting].reschedule(0.0)
            else:
                asyncio.get_running_loop().call_later(0.01, look)  # nothing tells of this

        plane._thread.call(look)

    monkeypatch.setattr(asyncio, "timeout", noted)
    return end


def in_trouble(what: str) -> Condition:
    """Whether a member that tries to join has heard, or found, something in particular."""
    return lambda plane: plane._client is not None and what in getattr(plane._client, "trouble", "")


def knows(*ranks: int) -> Condition:
    """Whether a member that joins has heard of these."""
    return lambda plane: plane._peers.keys() == set(ranks)


def connected(one: Member, other: Member) -> str:
    """Wait until two members are connected, check it, and return the link."""
    here, there = one.joined().rank, other.joined().rank
    ours = one.engine.wait(lambda engine: engine.attached.get(there))
    theirs = other.engine.wait(lambda engine: engine.attached.get(here))
    assert ours.link == theirs.link
    assert ours.initiator != theirs.initiator
    assert (ours.generation, theirs.generation) == (other.joined().generation, one.joined().generation)
    assert ours.peer_card == other.engine.label + ours.link.encode()
    assert len(ours.fds) == len(theirs.fds) == one.engine.links[ours.link][1]
    for left, right in zip(ours.fds, theirs.fds, strict=True):
        # The first bytes are the other engine's own: the handshake has left nothing and taken nothing.
        assert receive(left, len(other.engine.label)) == other.engine.label
        assert receive(right, len(one.engine.label)) == one.engine.label
    return ours.link


def receive(descriptor: int, nbytes: int) -> bytes:
    os.set_blocking(descriptor, True)
    return os.read(descriptor, nbytes)


# Worlds


@pytest.mark.parametrize("kind", ["abstract", "path", "file", "file with token", "tcp", "tcp name", "tcp6"])
def test_four_members_and_all_their_pairs(
    kind: str, tmp_path: Path, members: Callable[..., Member], port: Callable[..., int]
) -> None:
    token = "secret" if kind.startswith("tcp") or "token" in kind else None
    address = {
        "abstract": fresh_address(),
        "path": f"unix://{tmp_path}/socket",
        "file": f"file://{tmp_path}/address",
        "file with token": f"file://{tmp_path}/address",
        "tcp": f"tcp://127.0.0.1:{port()}",
        "tcp name": f"tcp://localhost:{port()}",
        "tcp6": f"tcp://[::1]:{port(socket.AF_INET6, '::1')}",
    }[kind]
    world = [members(address, rank, 4, token=token) for rank in (2, 0, 3, 1)]
    for member in world:
        welcome = member.joined()
        assert welcome.size == 4
        assert [peer.rank for peer in welcome.peers] == [rank for rank in range(4) if rank != welcome.rank]
        assert set(member.engine.peers) == {peer.rank for peer in welcome.peers}
        assert member.engine.identity == (welcome.rank, welcome.generation)
        assert not member.engine.is_open
    for warm in [member.plane.warm_up() for member in world]:
        warm.result(PATIENCE_S)
    for one, other in itertools.combinations(world, 2):
        assert connected(one, other) == "shm"
    for member in world:
        member.close()
    assert list(tmp_path.iterdir()) == []


def test_a_world_of_one(members: Callable[..., Member]) -> None:
    member = members(None)
    welcome = member.joined()
    assert (welcome.rank, welcome.size, welcome.peers) == (0, 1, ())
    member.plane.warm_up().result(PATIENCE_S)


def test_worlds_follow_each_other_at_one_address() -> None:
    address = fresh_address()
    for _ in range(5):
        # Each leaves and at once asks for the next world, while rank 0 may still be closing the old one.
        barrier = threading.Barrier(3)

        def live(rank: int, barrier: threading.Barrier = barrier) -> None:
            for _ in range(3):
                member = Member(address, rank, 3)
                assert len(member.joined().peers) == 2
                member.close()
            barrier.wait(PATIENCE_S)

        threads = [threading.Thread(target=live, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not barrier.broken


def test_an_incomplete_world_names_who_is_missing(
    members: Callable[..., Member], time_is_over: Callable[..., None]
) -> None:
    address = fresh_address()
    for member, other in [(members(address, rank, 4), 2 - rank) for rank in (0, 2)]:
        time_is_over(member, knows(other))
        with pytest.raises(DeadlineExceeded, match=r"2 of 4 processes did not come within 30 s: rank 1, 3"):
            member.joined()


def test_who_gave_up_can_try_again(members: Callable[..., Member], time_is_over: Callable[..., None]) -> None:
    """Also at once, in the same process and world."""
    address = fresh_address()
    host = members(address, 0, 3)
    for _ in range(3):
        hasty = members(address, 1, 3)
        time_is_over(hasty, knows(0))
        with pytest.raises(DeadlineExceeded, match="1 of 3 processes did not come"):
            hasty.joined()
        hasty.close()
    patient, last = members(address, 1, 3), members(address, 2, 3)
    for member in (host, patient, last):
        assert len(member.joined().peers) == 2
    patient.plane.request_pair(0)
    connected(patient, host)


def left_by_one(members: Callable[..., Member]) -> tuple[str, Member]:
    """The address of a world of two which rank 1 has left, and rank 0."""
    address = fresh_address()
    host, other = members(address, 0, 2), members(address, 1, 2)
    host.joined()
    other.joined()
    other.close()
    return address, host


def test_who_has_left_waits_for_the_next_world(
    members: Callable[..., Member], time_is_over: Callable[..., None]
) -> None:
    """Rank 0 may be about to leave the old one."""
    address, host = left_by_one(members)
    early, told = members(address, 1, 2), "has left the world there, and can only join the next one"
    time_is_over(early, in_trouble(told))
    with pytest.raises(DeadlineExceeded, match=told):
        early.joined()
    again = members(address, 1, 2)
    host.close()
    next_host = members(address, 0, 2)
    assert again.joined().generation in [peer.generation for peer in next_host.joined().peers]


def test_a_refusal_is_told_also_while_the_next_try_is_under_way(
    members: Callable[..., Member], time_is_over: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _ = left_by_one(members)
    authenticate, tries = Stream.authenticate_caller, []

    async def stuck_when_it_tries_again(stream: Stream, *arguments: Any) -> None:
        tries.append(stream)
        if len(tries) > 1:
            await asyncio.Event().wait()
        await authenticate(stream, *arguments)

    monkeypatch.setattr(Stream, "authenticate_caller", stuck_when_it_tries_again)
    early = members(address, 1, 2)
    time_is_over(early, lambda _: len(tries) > 1)
    with pytest.raises(DeadlineExceeded, match="has left the world there, and can only join the next one"):
        early.joined()


def test_a_rendezvous_that_is_slow_to_answer_lets_in_who_asked_once(
    members: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still with a request in its hands for longer than a handshake may take."""
    send, admit, go_on = Stream.send, Rendezvous._admit, threading.Event()
    limit_s = 0.01

    async def sent(stream: Stream, message: messages.Message) -> None:
        await send(stream, message)
        if isinstance(message, messages.Join) and message.rank == 1:  # whose own limits are over before this
            asyncio.get_running_loop().call_later(2 * limit_s, go_on.set)

    def stand_still(rendezvous: Rendezvous, seat: Any, announcements: Any) -> None:
        if seat.card.rank == 1:
            go_on.wait(PATIENCE_S)
        admit(rendezvous, seat, announcements)

    monkeypatch.setattr(Stream, "send", sent)
    monkeypatch.setattr(Rendezvous, "_admit", stand_still)
    address = fresh_address()
    host = members(address, 0, 2)
    guest = members(address, 1, 2, settings=Settings(handshake_timeout_s=limit_s))
    assert [peer.generation for peer in host.joined().peers] == [guest.joined().generation]
    assert not host.engine.lost


@pytest.mark.parametrize("size", [None, 1])
def test_a_host_that_stands_still_as_it_joins_its_own_world_is_in(
    size: int | None, members: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    admit, admitted = Rendezvous._admit, []

    def stand_still(rendezvous: Rendezvous, seat: Any, announcements: Any) -> None:
        admit(rendezvous, seat, announcements)
        admitted.append(seat.card.generation)
        loop: Any = asyncio.get_running_loop()
        if len(admitted) == 1:
            late_s, time = 2 * Settings().handshake_timeout_s, loop.time
            loop.time = lambda: time() + late_s

    monkeypatch.setattr(Rendezvous, "_admit", stand_still)
    host = members(fresh_address(), 0, size)
    assert [host.joined().generation] == admitted


def test_nobody_listens(members: Callable[..., Member]) -> None:
    with pytest.raises(DeadlineExceeded, match="is rank 0 running"):
        members(fresh_address(), 1, 2, timeout_s=0.2).joined()
    with pytest.raises(DeadlineExceeded, match="aiocomm rendezvous"):
        members(fresh_address(), timeout_s=0.2).joined()


def test_a_name_for_others_that_means_nothing_is_told(
    members: Callable[..., Member], caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(host="no-such-host.invalid")
    members(fresh_address(), 0, 1, settings=settings).joined()
    assert "AIOCOMM_HOST gives to others, no-such-host.invalid, is not known here" in caplog.text


def test_a_name_in_the_address_that_means_nothing_is_told(
    members: Callable[..., Member], caplog: pytest.LogCaptureFixture
) -> None:
    """It may be known to the others only, as that of a service in front of this host."""
    members("tcp://no-such-host.invalid:0", 0, 1, token="ours").joined()
    assert "the world's address gives to others, no-such-host.invalid, is not known here" in caplog.text


def test_a_name_that_no_thread_can_be_started_to_look_up_is_told(
    members: Callable[..., Member], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start

    def start_own(thread: threading.Thread) -> None:
        if thread.name != "aiocomm-control":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_own)
    address = "tcp://no-such-host.invalid:0"
    members(address, 0, 1, token="ours").joined()
    why = "the name no-such-host.invalid cannot be looked up: can't start new thread"
    assert f"is not known here: {why}" in caplog.text
    with pytest.raises(DeadlineExceeded, match=why):
        members(address, 1, 2, token="ours", timeout_s=0.2).joined()


def test_joining_can_be_given_up(members: Callable[..., Member]) -> None:
    address = fresh_address()
    host, other = members(address, 0, 2), members(fresh_address(), 1, 2)
    other.joining.cancel()
    host.plane.close().result(PATIENCE_S)
    for member in (host, other):
        with pytest.raises(CancelledError):
            member.joined()


def test_a_taken_address(
    members: Callable[..., Member], time_is_over: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not waited for until the time is over."""
    monkeypatch.setattr("aiocomm._control.plane._TAKEN_S", 0.1)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        world = [members(f"tcp://127.0.0.1:{port}", rank, 2, token="t") for rank in range(2)]
        with pytest.raises(LinkError, match=r"rank 0 cannot listen at .*: Address already in use; .* choose"):
            world[0].joined()
        time_is_over(world[1], in_trouble(told := "does not answer as a rendezvous would"))
        with pytest.raises(DeadlineExceeded, match=told):
            world[1].joined()


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("tcp://192.0.2.1:7000", "Cannot assign requested address; start it on the host that has"),
        ("unix:///no/such/folder/meeting", "No such file or directory; make the folder"),
    ],
)
@pytest.mark.parametrize("host_rank", [0, None])
def test_an_address_that_cannot_be_had_is_told_with_what_to_do(
    address: str, told: str, host_rank: int | None
) -> None:
    who = "rank 0" if host_rank == 0 else "the rendezvous"
    with pytest.raises(LinkError, match=f"^{who} cannot listen at {address}: {told}"):
        asyncio.run(Host(None, parse(address), b"ours", Settings(), host_rank).start(0.0))


def test_a_file_that_is_no_socket_is_left_alone(
    tmp_path: Path, members: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses a connect, as a socket does that a dead process has left."""
    monkeypatch.setattr("aiocomm._control.plane._TAKEN_S", 0.1)
    path = tmp_path / "model"
    path.write_text("weights")
    with pytest.raises(LinkError, match="Address already in use"):
        members(f"unix://{path}", 0, 1).joined()
    assert path.read_text() == "weights"


def test_a_socket_that_a_dead_process_has_left_is_taken(
    tmp_path: Path, members: Callable[..., Member]
) -> None:
    path = tmp_path / "meeting"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert members(f"unix://{path}", 0, 1).joined().rank == 0


def test_a_world_that_closes_leaves_the_next_one_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: Callable[..., Member]
) -> None:
    address = parse(f"unix://{tmp_path / 'meeting'}")
    assert isinstance(address, UnixAddress)
    following: list[socket.socket] = []
    close = Listener.aclose

    async def close_and_be_followed(listener: Listener) -> None:
        own = listener._sock.getsockname()
        await close(listener)
        if own == address.sockaddr and not following:
            following.append(bind(address)[0])

    monkeypatch.setattr(Listener, "aclose", close_and_be_followed)
    world = members(str(address), 0, 1)
    world.joined()
    world.close()
    with following[0], socket.socket(socket.AF_UNIX) as guest:
        guest.connect(address.sockaddr)


# Who may join


def test_a_taken_rank_is_refused(members: Callable[..., Member]) -> None:
    address = fresh_address()
    world = [members(address, rank, 2) for rank in range(2)]
    world[1].joined()
    with pytest.raises(UsageError, match=f"rank 1 is taken by process {os.getpid()}"):
        members(address, 1, 2).joined()
    with pytest.raises(UsageError, match="expects 3 processes, but this world has 2"):
        members(address, 1, 3).joined()
    with pytest.raises(UsageError, match="fixed size of 2"):
        members(address).joined()


@pytest.mark.parametrize(("host", "guest"), [("one", "two"), ("one", None), (None, "two")])
def test_another_token_is_refused(
    host: str | None, guest: str | None, members: Callable[..., Member]
) -> None:
    address = fresh_address()
    world = [members(address, rank, 2, token=host) for rank in range(2)]
    world[0].joined()
    with pytest.raises(AuthenticationError, match="AIOCOMM_TOKEN"):
        members(address, 1, 2, token=guest).joined()
    world[0].plane.warm_up().result(PATIENCE_S)
    connected(*world)


def test_something_else_listens_there(members: Callable[..., Member]) -> None:
    """It is told where, since the address may have come from somewhere else."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionError):  # it hangs up
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" * 4)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(AuthenticationError, match=f"{address}: the other end is not aiocomm"):
            members(address, 1, 2, token="ours").joined()
        thread.join()


@pytest.mark.parametrize("rank", [0, 1])
def test_tcp_needs_a_token(rank: int, members: Callable[..., Member], port: Callable[..., int]) -> None:
    with pytest.raises(UsageError, match="needs a token"):
        members(f"tcp://127.0.0.1:{port()}", rank, 2).joined()


def test_an_address_file_of_others_is_not_trusted(
    tmp_path: Path, members: Callable[..., Member], time_is_over: Callable[..., None]
) -> None:
    path = tmp_path / "address"
    path.write_text("tcp://127.0.0.1:1\n\n")
    path.chmod(0o644)
    member = members(f"file://{path}", 1, 2)
    time_is_over(member, in_trouble("not be safe to trust"))
    with pytest.raises(DeadlineExceeded, match="not be safe to trust"):
        member.joined()


def test_a_stale_address_file_does_not_matter(
    tmp_path: Path, members: Callable[..., Member], port: Callable[..., int]
) -> None:
    path = tmp_path / "address"
    path.write_text(f"tcp://127.0.0.1:{port()}\nold\n")
    path.chmod(0o600)
    guest = members(f"file://{path}", 1, 2)
    host = members(f"file://{path}", 0, 2)
    assert guest.joined().size == host.joined().size == 2


def test_a_file_that_holds_something_else_is_left_alone(
    tmp_path: Path, members: Callable[..., Member]
) -> None:
    path = tmp_path / "notes"
    path.write_text("what somebody has written\n")
    with pytest.raises(LinkError, match="exists and holds no address: delete it, or choose another path"):
        members(f"file://{path}", 0, 1).joined()
    assert path.read_text() == "what somebody has written\n"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(LinkError, match="exists and holds no address"):
        members(f"file://{pipe}", 0, 1).joined()


def test_an_empty_file_is_taken(tmp_path: Path, members: Callable[..., Member]) -> None:
    path = tmp_path / "address"
    path.touch()
    assert members(f"file://{path}", 0, 1).joined().rank == 0


# Pairs


def test_both_ends_ask_at_once() -> None:
    for _ in range(15):
        address = fresh_address()
        world = [Member(address, rank, 3) for rank in range(3)]
        for member in world:
            member.joined()
        barrier = threading.Barrier(3)

        def ask(member: Member, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(PATIENCE_S)
            for rank in range(3):
                if rank != member.joined().rank:
                    member.plane.request_pair(rank)
                    member.plane.request_pair(rank)

        threads = [threading.Thread(target=ask, args=(member,)) for member in world]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        for one, other in itertools.combinations(world, 2):
            connected(one, other)
        for member in world:
            assert not member.engine.failed
            member.close()


def test_one_end_asks(members: Callable[..., Member]) -> None:
    address = fresh_address()
    low, high = members(address, 0, 2), members(address, 1, 2)
    high.plane.request_pair(0)  # before it has joined
    assert connected(low, high) == "shm"
    assert high.engine.attached[0].initiator


def test_tcp_on_one_host_works_without_a_token(members: Callable[..., Member]) -> None:
    address = fresh_address()
    world = [
        members(address, rank, 2, engine=RecordingEngine(TCP_ONLY, label=b"%d" % rank)) for rank in range(2)
    ]
    world[0].plane.request_pair(1)
    assert connected(*world) == "tcp"


@pytest.mark.parametrize("where", ["caller", "called"])
def test_a_broken_link_falls_back_to_the_next(where: str, members: Callable[..., Member]) -> None:
    address = fresh_address()
    broken = frozenset({"shm"})
    engines = [RecordingEngine(label=b"%d" % rank) for rank in range(2)]
    engines[0 if where == "caller" else 1].broken = broken
    world = [members(address, rank, 2, engine=engine) for rank, engine in enumerate(engines)]
    world[0].plane.request_pair(1)
    for rank, engine in enumerate(engines):
        engine.wait(
            lambda engine, other=1 - rank: (
                engine.attached.get(other, None) and engine.attached[other].link == "tcp"
            )
        )
        fallbacks = engine.wait(
            lambda engine: [event for event in engine.events if isinstance(event, Fallback)]
        )
        assert fallbacks == [Fallback("shm", 1 - rank, "tcp", "shm is broken here")]
        engine.wait(lambda engine, other=1 - rank: engine.started.get(other) == "tcp")
    # The caller had taken the link when the called side could not: it lets go without a word.
    assert engines[0].detached == ([(1, "shm")] if where == "called" else [])


def up(*engines: RecordingEngine) -> None:
    """Wait until ranks 0 and 1 are connected at both ends."""
    for rank, engine in enumerate(engines):
        engine.wait(
            lambda engine, other=1 - rank: engine.pair_state(other, engine.peers.get(other, 0)) == "up"
        )


@pytest.mark.parametrize("caller", [0, 1])
def test_a_pair_whose_link_fails_is_made_anew_over_the_next(
    caller: int, members: Callable[..., Member]
) -> None:
    address = fresh_address()
    engines = [RecordingEngine(label=b"%d" % rank) for rank in range(2)]
    world = [members(address, rank, 2, engine=engine) for rank, engine in enumerate(engines)]
    world[0].plane.request_pair(1)
    up(*engines)
    engines[caller].break_pair(1 - caller)
    world[caller].plane.request_pair(1 - caller)  # before the other end has seen it fail
    engines[1 - caller].break_pair(caller)
    for rank, engine in enumerate(engines):
        engine.wait(lambda engine, other=1 - rank: engine.started.get(other) == "tcp")
        fallback = engine.wait(
            lambda engine: [event for event in engine.events if isinstance(event, Fallback)]
        )
        assert fallback == [Fallback("shm", 1 - rank, "tcp", "the link failed")]


def test_without_fallback_a_pair_is_made_anew_over_the_link_it_had(members: Callable[..., Member]) -> None:
    address = fresh_address()
    engines = [RecordingEngine(label=b"%d" % rank) for rank in range(2)]
    settings = Settings(link_fallback="off")
    world = [
        members(address, rank, 2, engine=engine, settings=settings) for rank, engine in enumerate(engines)
    ]
    world[0].plane.request_pair(1)
    up(*engines)
    for rank, engine in enumerate(engines):
        engine.break_pair(1 - rank)
    world[0].plane.request_pair(1)
    up(*engines)
    for rank, engine in enumerate(engines):
        assert engine.started == {1 - rank: "shm"}
        assert not [event for event in engine.events if isinstance(event, Fallback)]
    assert engines[1].detached == []
    assert not any(engine.lost for engine in engines)


@pytest.mark.parametrize("encrypting", [0, 1])
def test_tls_at_one_end_only_is_told(encrypting: int, members: Callable[..., Member]) -> None:
    address = fresh_address()
    tls = [Settings(), Settings()]
    tls[encrypting] = Settings(tls_cert="/cert.pem", tls_ca="/ca.pem")
    here, there = (
        members(address, rank, 2, engine=RecordingEngine(TCP_ONLY), settings=tls[rank]) for rank in range(2)
    )
    here.joined(), there.joined()
    here.plane.request_pair(1)
    reason = here.engine.wait(lambda engine: engine.failed.get(1))
    assert (
        "tcp: one end uses TLS, the other does not: set AIOCOMM_TLS_CERT and AIOCOMM_TLS_CA on both" in reason
    )
    assert not here.engine.attached
    assert not there.engine.attached


def test_no_common_link_is_reported_and_can_be_tried_again(members: Callable[..., Member]) -> None:
    address = fresh_address()
    engines = [RecordingEngine({"shm": ("unix", 1)}), RecordingEngine(TCP_ONLY)]
    world = [members(address, rank, 2, engine=engine) for rank, engine in enumerate(engines)]
    world[0].joined()
    for _ in range(2):
        world[0].plane.request_pair(1)
        reason = engines[0].wait(lambda engine: engine.failed.pop(1, None))
        assert "no link in common (here: shm; there: tcp; on one host)" in reason


def test_a_peer_that_does_not_answer_holds_up_nobody(
    members: Callable[..., Member], processes: Callable[..., Any]
) -> None:
    address = fresh_address()
    here = members(address, 0, 3)
    silent = processes(address, 1, 3, wait=False)
    prompt = members(address, 2, 3)
    here.joined()
    ready(silent)
    silent.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, silent.pid, os.WSTOPPED)
    limit_calls(here, 0.2)
    here.plane.request_pair(1)
    reach(here, 2)
    connected(here, prompt)
    reason = here.engine.wait(lambda engine: engine.failed.pop(1, None))
    assert "no answer within 0.2 s while waiting for its hello, in the last of 3 tries: is the" in reason
    assert "raise AIOCOMM_HANDSHAKE_TIMEOUT_S" in reason
    limit_calls(here, PATIENCE_S)
    silent.send_signal(signal.SIGCONT)
    reach(here, 1)


def test_a_call_that_broke_off_as_its_link_was_ready_is_made_anew(members: Callable[..., Member]) -> None:
    """The called end is about to say so, and stands still until the caller's time is over."""
    address = fresh_address()
    here = members(address, 0, 2)
    there = members(address, 1, 2, engine=(late := LateEngine(label=b"late")))
    here.joined(), there.joined()
    limit_calls(here, 0.2)
    here.plane.request_pair(1)
    reason = here.engine.wait(lambda engine: engine.failed.pop(1, None))
    assert "no answer within 0.2 s while waiting" in reason
    limit_calls(here, PATIENCE_S)
    late.go_on.set()
    reach(here, 1)
    assert connected(here, there) == "shm"


@pytest.mark.parametrize("link", ["shm", "tcp"])
def test_a_process_that_stands_still_in_the_midst_of_a_call_goes_on_with_it(
    link: str, members: Callable[..., Member]
) -> None:
    """It computes and holds its GIL, say, for longer than any step may take."""
    address = fresh_address()
    calls = []

    class StandsStill(RecordingEngine):
        def link_card(self, name: str) -> bytes:
            calls.append(name)
            loop: Any = asyncio.get_running_loop()
            late_s, time = 2 * Settings().handshake_timeout_s, loop.time
            loop.time = lambda: time() + late_s
            return super().link_card(name)

    links = {link: RecordingEngine().links[link]}
    world = [members(address, rank, 2, engine=StandsStill(links, label=b"%d:" % rank)) for rank in range(2)]
    world[0].joined(), world[1].joined()
    world[0].plane.request_pair(1)
    assert connected(*world) == link
    assert calls == [link, link]


class LateEngine(RecordingEngine):
    """Gives its card, by which a called end says that it is ready, once it may."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.go_on = threading.Event()

    def link_card(self, link: str) -> bytes:
        self.go_on.wait(PATIENCE_S)
        return super().link_card(link)


def limit_calls(here: Member, limit_s: float) -> None:
    """Give the next calls so much time; joining, which the setting would limit as well, has had its own."""
    assert here.plane._pairing is not None
    here.plane._pairing._timeout_s = limit_s


def reach(here: Member, rank: int) -> None:
    """Connect with a peer that may be slow: each call has little time, and a later wish tries again."""
    while rank not in here.engine.attached:
        here.plane.request_pair(rank)
        here.engine.wait(lambda engine: rank in engine.attached or engine.failed.pop(rank, None))


# Leaving, dying, coming back


def test_a_member_that_leaves_has_left(members: Callable[..., Member]) -> None:
    address = fresh_address()
    world = [members(address, rank, 3) for rank in range(3)]
    for member in world:
        member.joined()
    generation = world[1].joined().generation
    world[1].close()
    for member in (world[0], world[2]):
        member.engine.wait(lambda engine: (1, generation) in engine.left)
        assert not member.engine.lost


def test_rank_zero_leaves_and_the_others_go_on(members: Callable[..., Member]) -> None:
    address = fresh_address()
    world = [members(address, rank, 3) for rank in range(3)]
    generation = world[0].joined().generation
    world[0].close()
    for member in world[1:]:
        member.engine.wait(lambda engine: (0, generation) in engine.left)
    world[1].plane.request_pair(2)
    connected(world[1], world[2])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_lost(
    victim: int, members: Callable[..., Member], processes: Callable[..., Any]
) -> None:
    address = fresh_address()
    process = processes(address, victim, 3, wait=False)
    others = [members(address, rank, 3) for rank in range(3) if rank != victim]
    _, generation = ready(process)
    for member in others:
        member.joined()
        member.plane.request_pair(victim)
        member.engine.wait(lambda engine: victim in engine.attached)
    process.kill()
    for member in others:
        assert "died" in member.engine.wait(lambda engine: engine.lost.get((victim, generation)))
    others[0].plane.request_pair(others[1].joined().rank)
    connected(*others)


FORKS = """
import os, signal, sys
from aiocomm._control.testing import Member

member = Member(sys.argv[1], 1, 2, token="ours")
member.joined()
if not os.fork():
    sys.stdin.read()
    os._exit(0)
print("forked", flush=True)
signal.pause()
"""


def test_who_is_killed_is_lost_although_a_child_that_it_forked_lives_on(
    members: Callable[..., Member], port: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProcessWatch, "add", lambda *_: None)  # as of processes on other hosts
    address = f"tcp://127.0.0.1:{port()}"
    host = members(address, 0, 2, token="ours")
    with subprocess.Popen(
        [sys.executable, "-c", FORKS, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"forked\n"
        process.kill()
        (reason,) = host.engine.wait(lambda engine: [*engine.lost.values()])
        assert reason.endswith("died: its control connection broke")


def test_a_restarted_rank_is_another_peer(
    members: Callable[..., Member], processes: Callable[..., Any]
) -> None:
    address = fresh_address()
    first = processes(address, 1, 2, wait=False)
    here = members(address, 0, 2)
    _, old = ready(first)
    here.joined()
    here.plane.request_pair(1)
    here.engine.wait(lambda engine: 1 in engine.attached)
    first.kill()
    here.engine.wait(lambda engine: (1, old) in engine.lost)
    second = members(address, 1, 2)
    new = second.joined().generation
    assert new > old
    here.engine.wait(lambda engine: engine.peers[1] == new)
    joined = here.engine.wait(
        lambda engine: [event for event in engine.events if isinstance(event, PeerJoined)]
    )
    assert (joined[0].peer.rank, joined[0].peer.generation, joined[0].peer.pid) == (1, new, os.getpid())
    second.plane.request_pair(0)
    here.engine.wait(lambda engine: engine.attached[1].generation == new)


# Elastic worlds


@pytest.fixture
def rendezvous() -> Iterator[str]:
    """A rendezvous without a rank."""
    thread = LoopThread("rendezvous")
    address = fresh_address()
    host = Host(None, parse(address), None, Settings(), host_rank=None)
    thread.submit(host.start(0.0)).result(PATIENCE_S)
    yield address
    thread.submit(host.aclose()).result(PATIENCE_S)
    thread.stop()
    thread.join(PATIENCE_S)


def test_an_elastic_world_grows_and_shrinks(rendezvous: str, members: Callable[..., Member]) -> None:
    first = members(rendezvous, name="prefill")
    assert first.joined().peers == ()
    second = members(rendezvous, name="decode")
    assert [peer.name for peer in second.joined().peers] == ["prefill"]
    event = first.engine.wait(lambda engine: engine.events and engine.events[0])
    assert isinstance(event, PeerJoined)
    assert (event.peer.rank, event.peer.name) == (1, "decode")
    second.plane.request_pair(0)
    connected(first, second)
    second.close()
    first.engine.wait(lambda engine: [rank for rank, _ in engine.left] == [1])
    third = members(rendezvous)
    assert (third.joined().rank, third.joined().size) == (2, None)
    third.plane.warm_up().result(PATIENCE_S)
    connected(first, third)


def test_a_newcomer_connects_with_those_who_stay(
    members: Callable[..., Member], processes: Callable[..., tuple[subprocess.Popen[bytes], int, int]]
) -> None:
    """Whoever dies while a newcomer warms up is no reason not to join an elastic world."""
    address = fresh_address()
    host = members(address, 0)
    host.joined()
    process, rank, generation = processes(address)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    newcomer = members(address)
    assert {peer.rank for peer in newcomer.joined().peers} == {0, rank}
    warm = newcomer.plane.warm_up()
    connected(host, newcomer)
    assert not warm.done()
    process.kill()
    warm.result(PATIENCE_S)
    assert (rank, generation) in newcomer.engine.lost


def test_rank_zero_can_host_an_elastic_world(members: Callable[..., Member]) -> None:
    address = fresh_address()
    guest = members(address)
    host = members(address, 0)
    assert host.joined().rank == 0
    assert guest.joined().rank == 1
    guest.plane.request_pair(0)
    connected(host, guest)


def test_a_lost_rendezvous_leaves_the_peers_alone() -> None:
    address = fresh_address()
    process = subprocess.Popen(
        [sys.executable, "-m", "aiocomm", "rendezvous", "--listen", address], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"listening at {address}\n".encode()
        world = [Member(address) for _ in range(2)]
        first, second = (member.joined().rank for member in world)
        # Arrivals are told a little later, several together.
        world[0].engine.wait(lambda engine: second in engine.peers)
        world[1].engine.wait(lambda engine: first in engine.peers)
        assert all(member.engine.is_open for member in world)
        process.kill()
    for member in world:
        events = member.engine.wait(
            lambda engine: [event for event in engine.events if isinstance(event, LinkDown)]
        )
        assert (events[0].link, events[0].rank) == ("rendezvous", -1)
        assert "died" in events[0].reason
        assert not member.engine.is_open  # nobody can join any more
    world[0].plane.request_pair(world[1].joined().rank)
    world[0].engine.wait(lambda engine: engine.attached)
    for member in world:
        assert not member.engine.lost
        member.close()


def test_a_rendezvous_whose_frames_were_changed_is_lost(members: Callable[..., Member]) -> None:
    address = fresh_address()
    host, guest = members(address, 0, 2), members(address, 1, 2)
    host.joined()
    guest.joined()
    client, hosting = guest.plane._client, host.plane._hosting
    assert client is not None
    assert client._stream is not None
    assert client._stream._parser is not None
    assert hosting is not None
    client._stream._parser._seal = Seal(b"another")
    host.plane._thread.call(hosting.rendezvous._seats[1].post, messages.Heartbeat())
    lost = guest.engine.wait(lambda engine: engine.lost)
    assert "broke the control protocol (a control frame was changed" in str(lost)


def test_of_a_member_whose_frames_were_changed_the_reason_is_told(members: Callable[..., Member]) -> None:
    address = fresh_address()
    host, guest = members(address, 0, 2), members(address, 1, 2)
    host.joined()
    guest.joined()
    client = guest.plane._client
    assert client is not None
    assert client._stream is not None
    client._stream._seal = Seal(b"another")
    guest.close()  # its goodbye
    lost = host.engine.wait(lambda engine: engine.lost)
    assert "broke the control protocol (a control frame was changed" in str(lost)


class OddEngine(RecordingEngine):
    """Cannot take one of its peers."""

    def add_peer(self, rank: int, generation: int) -> None:
        if rank == 2:
            raise MemoryError("no room for a peer")
        super().add_peer(rank, generation)


def test_who_fails_to_follow_the_rendezvous_goes_on_as_without_it(
    members: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, hold = threading.Event(), Vigil._hold

    async def held(vigil: Vigil, stream: Stream, card: messages.PeerCard) -> None:
        if card.rank == 2:
            watched.set()
        await hold(vigil, stream, card)

    monkeypatch.setattr(Vigil, "_hold", held)
    address = fresh_address()
    settings = Settings(heartbeat_s=0.05)
    host = members(address, 0, settings=settings)
    guest = Member(address, engine=(odd := OddEngine()), settings=settings)
    try:
        assert (host.joined().rank, guest.joined().rank) == (0, 1)
        third = members(address, settings=settings)
        (reason,) = odd.wait(lambda engine: [*engine.lost.values()])
        assert reason.startswith("this process cannot follow the rendezvous any more (MemoryError('no room")
        generation = third.joined().generation
        assert watched.wait(PATIENCE_S)
        third.close()
        odd.wait(lambda engine: engine.left == [(2, generation)])
    finally:
        guest.close()
    # It has said goodbye.
    host.engine.wait(lambda engine: (1, guest.joined().generation) in engine.left)


def test_closing_twice_and_before_starting_is_fine() -> None:
    member = Member(None)
    member.joined()
    assert member.plane.close() is member.plane.close()
    member.close()

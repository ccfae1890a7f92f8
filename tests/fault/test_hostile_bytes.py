"""Hostile bytes on every listening socket: no crash, no hang, no unbounded memory, and the world goes on.

Each corpus file, and mutations of it from a fixed seed, is sent to each socket: as the first bytes of a
connection, and behind a handshake that is right (an insider gone wrong). Every such connection must be closed
by the other side. AIOCOMM_FUZZ_SEED and AIOCOMM_FUZZ_ROUNDS change the mutations and their number.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fault.fuzzing import ROUNDS, SEED, resident

from aiocomm._control import messages, wire
from aiocomm._control.address import TcpAddress, UnixAddress, parse
from aiocomm._control.auth import HELLO_SIZE, PROOF_SIZE, VERDICT_SIZE, Caller, Purpose, Seal
from aiocomm._control.testing import Member, RecordingEngine
from aiocomm._process import fresh_address
from aiocomm.config import Settings

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

PATIENCE_S = 60.0
CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
LOOK_MS = 50
MUTATIONS = 6 * ROUNDS
MEMORY_BOUND = 48 << 20
# Here it is over when the test says so; in a process of its own, sooner.
SETTINGS = Settings(handshake_timeout_s=600, max_pending=64)
HANDSHAKE_S = 0.5


class World:
    """Two members that meet at a Unix socket or a TCP port, and the sockets that others can reach."""

    def __init__(self, address: str, token: str | None) -> None:
        self.address, self.token = address, token
        self.members = [
            Member(
                address, rank, 2, token=token, settings=SETTINGS, engine=RecordingEngine(label=b"%d" % rank)
            )
            for rank in range(2)
        ]
        card = self.members[0].joined().card
        self.members[1].joined()
        self.control = parse(address)
        self.pair_unix, self.pair_tcp = map(parse, card.addresses)
        self._passed_s = 0.0
        for loop in self._loops():
            loop.time = lambda: time.monotonic() + self._passed_s  # type: ignore[method-assign]

    def _loops(self) -> list[asyncio.AbstractEventLoop]:
        loops = [member.plane._thread._loop for member in self.members]
        return [loop for loop in loops if loop is not None]

    def time_passes(self) -> None:
        """The members take it that the time of every handshake is over which has begun before."""
        self._passed_s += SETTINGS.handshake_timeout_s
        for loop in self._loops():
            loop.call_soon_threadsafe(int)  # it looks at the time again

    def key(self, purpose: Purpose) -> bytes | None:
        """What an insider knows."""
        if purpose is Purpose.PAIR:
            pairing = self.members[0].plane._pairing
            assert pairing is not None
            return pairing._dial.__self__._key  # type: ignore[attr-defined, no-any-return]
        return self.token.encode() if self.token is not None else None

    def targets(self) -> list[tuple[str, Purpose]]:
        return [("control", Purpose.CONTROL), ("pair_unix", Purpose.PAIR), ("pair_tcp", Purpose.PAIR)]

    def check(self) -> None:
        """The world still works."""
        self.members[1].plane.request_pair(0)
        for rank, member in enumerate(self.members):
            member.engine.wait(lambda engine, other=1 - rank: other in engine.attached)
            assert not member.engine.lost
            assert not member.engine.failed

    def close(self) -> None:
        for member in self.members:
            member.close()


@pytest.fixture(params=["unix", "unix with token", "tcp"])
def world(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[World]:
    host = ".".join(map(str, (127, *(1 + os.getpid()).to_bytes(3, "big"))))  # where no other process looks
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    address = f"tcp://{host}:{port}" if request.param == "tcp" else fresh_address()
    made = World(address, None if request.param == "unix" else "token")
    yield made
    made.check()
    made.close()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def dial(address: object) -> socket.socket:
    if isinstance(address, UnixAddress):
        sock = socket.socket(socket.AF_UNIX)
        target: object = address.sockaddr
    else:
        assert isinstance(address, TcpAddress)
        sock = socket.socket()
        target = (address.host, address.port)
    sock.connect(target)  # type: ignore[arg-type]
    sock.settimeout(PATIENCE_S)  # later: a Unix socket with a timeout does not wait for a full backlog
    return sock


def insider(
    address: object, key: bytes | None, purpose: Purpose, limit_s: float = HANDSHAKE_S
) -> tuple[socket.socket, Seal]:
    """A connection that has authenticated; another one if that took longer than it may take."""
    while True:
        began = time.monotonic()
        sock = dial(address)
        try:
            return sock, authenticate(sock, key, purpose)
        except ConnectionError:
            sock.close()
            if time.monotonic() - began < limit_s:
                raise


def authenticate(sock: socket.socket, key: bytes | None, purpose: Purpose) -> Seal:
    side = Caller(key, purpose)
    sock.sendall(side.hello())
    sock.sendall(side.answer(read(sock, HELLO_SIZE)))
    side.finish(read(sock, VERDICT_SIZE))
    return side.seals()[0]


def sealed(data: bytes, seal: Seal) -> bytes:
    """Data with a right tag behind everything that has the length of a frame."""
    out = b""
    while len(data) >= 8 and len(data) >= (end := 8 + int.from_bytes(data[4:8], "big")):
        out += data[:end] + seal.tag(data[:end])
        data = data[end:]
    return out + data


def read(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        portion = sock.recv(nbytes - len(data))
        if not portion:
            raise ConnectionAbortedError("the other side has closed it")
        data += portion
    return data


def closed_by_peer(socks: list[socket.socket], time_passes: Callable[[], None] | None = None) -> None:
    """Wait until the other side has closed every connection, by its time limit if need be; close ours."""
    waiting = {sock.fileno(): sock for sock in socks}
    poll = select.poll()
    for descriptor in waiting:
        poll.register(descriptor, select.POLLIN)
    until = time.monotonic() + PATIENCE_S
    while waiting:
        ready = poll.poll(LOOK_MS)
        assert time.monotonic() < until, f"{len(waiting)} connections are still open"
        if not ready and time_passes is not None:
            time_passes()
        for descriptor, _ in ready:
            try:
                over = not waiting[descriptor].recv(65536)
            except ConnectionResetError:
                over = True
            if over:
                poll.unregister(descriptor)
                waiting.pop(descriptor).close()


def mutations(seed: bytes, rng: random.Random) -> Iterator[bytes]:
    """The seed, then changed ones."""
    yield seed
    for _ in range(MUTATIONS):
        data = bytearray(seed)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.choice((0, 1, 127, 128, 255))
                case 2:
                    del data[at:]
                case 3:
                    data[at:at] = rng.randbytes(rng.randint(1, 16))
            if not data:
                data = bytearray(b"\0")
        yield bytes(data)


def send(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # it may have heard enough after the first bytes
        sock.sendall(data)


@pytest.mark.parametrize("inside", [False, True], ids=["outsider", "insider"])
def test_corpus_and_mutations(world: World, inside: bool) -> None:
    rng = random.Random(2 + SEED)
    before = resident()
    for name, purpose in world.targets():
        attack(getattr(world, name), world.key(purpose), purpose, inside, rng, world.time_passes)
    assert resident() - before < MEMORY_BOUND


def attack(
    address: object,
    key: bytes | None,
    purpose: Purpose,
    inside: bool,
    rng: random.Random,
    time_passes: Callable[[], None] | None = None,
    hang_up: bool = False,
) -> None:
    """Send the corpus, and mutations of it, each on a connection of its own; returns once all are closed.

    Of the corpus itself the other side has to close, by its time limit if need be; `hang_up`: it may take
    some of it for good.
    """
    seeds: list[socket.socket] = []
    for path in CORPUS:
        changed: list[socket.socket] = []
        for number, data in enumerate(mutations(path.read_bytes(), rng)):
            if inside:
                sock, seal = insider(address, key, purpose)
                data = sealed(data, seal) if rng.randrange(8) else data
            else:
                sock = dial(address)
            send(sock, data)
            (changed if number else seeds).append(sock)
        for sock in [*changed, *(seeds if hang_up else ())]:  # an end spares the wait for the time limit
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        closed_by_peer(changed)
    closed_by_peer(seeds, time_passes)


@pytest.mark.parametrize("inside", [False, True], ids=["outsider", "insider"])
def test_the_rendezvous_command(inside: bool) -> None:
    """A process of its own, which must live on, small, and bring members together."""
    address = fresh_address()
    env = {**os.environ, "AIOCOMM_TOKEN": "token", "AIOCOMM_HANDSHAKE_TIMEOUT_S": str(HANDSHAKE_S)}
    command = [sys.executable, "-m", "aiocomm", "rendezvous", "--listen", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        try:
            _attack_and_use(process, address, inside)
        finally:
            process.kill()


def _attack_and_use(process: subprocess.Popen[bytes], address: str, inside: bool) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"listening at ")
    before = resident(process.pid)
    # Who knows the token may join: those are members until they hang up.
    attack(parse(address), b"token", Purpose.CONTROL, inside, random.Random(3 + SEED), hang_up=inside)
    assert resident(process.pid) - before < MEMORY_BOUND
    members = [Member(address, token="token", engine=RecordingEngine(label=b"%d" % n)) for n in range(2)]
    members.sort(key=lambda member: member.joined().rank)
    first, second = (member.joined().rank for member in members)
    assert first < second
    members[1].plane.request_pair(first)  # it knows whoever was there when it came
    members[0].engine.wait(lambda engine: second in engine.attached)
    for member in members:
        member.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
    assert b"Traceback" not in process.stderr.read()


def test_a_frame_is_judged_by_its_header(world: World) -> None:
    """Nothing is read, or kept, of a frame that claims to be too long."""
    sock, _ = insider(world.control, world.key(Purpose.CONTROL), Purpose.CONTROL)
    sock.sendall(b"AC\x01\x01" + (1 << 31).to_bytes(4, "big"))
    closed_by_peer([sock])


def test_connections_that_say_nothing_or_little(world: World) -> None:
    """Slow ones, one byte at a time, are dropped in time, and hold up nobody meanwhile."""
    for name, purpose in world.targets():
        slow = [dial(getattr(world, name)) for _ in range(SETTINGS.max_pending // 2)]
        hello = Caller(world.key(purpose), purpose).hello()
        for number, sock in enumerate(slow):
            send(sock, hello if number % 2 else hello[:1])
        honest = dial(getattr(world, name))
        authenticate(honest, world.key(purpose), purpose)
        passed = 0

        def a_byte_at_a_time(slow: list[socket.socket] = slow) -> None:
            nonlocal passed
            passed += 1
            for sock in slow:
                with contextlib.suppress(OSError):  # it is closed
                    sock.send(b"\0")
            world.time_passes()

        closed_by_peer([*slow, honest], a_byte_at_a_time)
        assert passed < PROOF_SIZE


@pytest.mark.parametrize("name", ["control", "pair_unix", "pair_tcp"])
def test_a_flood_of_connections(world: World, name: str) -> None:
    """Many more than may be pending: descriptors stay bounded, and honest ones get in."""
    flood = """
import socket, sys
kind, host, port, n = sys.argv[1:]
made = []
for _ in range(int(n)):
    sock = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    sock.connect(chr(0) + host if kind == "unix" else (host, int(port)))
    made.append(sock)
print("connected", flush=True)
sys.stdin.read()
"""
    base = len(os.listdir("/proc/self/fd"))
    purpose = dict(world.targets())[name]
    target = getattr(world, name)
    where = (
        ["unix", target.path[1:], "0"]
        if isinstance(target, UnixAddress)
        else ["tcp", target.host, str(target.port)]
    )
    with subprocess.Popen(
        [sys.executable, "-c", flood, *where, "400"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"connected\n"
        # Who is slower than what is still to come of the flood is dropped for that.
        honest, _ = insider(target, world.key(purpose), purpose, limit_s=0.0)
        with honest:
            assert len(os.listdir("/proc/self/fd")) <= base + 2 * SETTINGS.max_pending
        assert process.stdin is not None
        process.stdin.close()


def test_insiders_that_call_and_hang_up(world: World) -> None:
    """A pair call that is broken off at each of its steps leaves the pair free for the real one."""
    me, other = (member.joined() for member in world.members)
    offer = messages.Offer(b"a" * 16, other.rank, other.generation, me.rank, me.generation)
    steps = [
        wire.encode(offer),
        wire.encode(offer)[:-1],
        wire.encode(offer) + wire.encode(messages.LinkTry("shm", 1, False, b"card")),
        wire.encode(offer) + wire.encode(messages.LinkTry("shm", 2**60, False, b"card")),
        wire.encode(offer) + wire.encode(messages.LinkTry("nonsense", 1, False, b"")),
        wire.encode(offer)
        + wire.encode(messages.LinkTry("shm", 1, False, b""))
        + wire.encode(messages.Attached("shm")),
        wire.encode(offer) + wire.encode(messages.Unattached("shm", "no")),
    ]
    for step in steps:
        sock, seal = insider(world.pair_unix, world.key(Purpose.PAIR), Purpose.PAIR)
        send(sock, sealed(step, seal))
        sock.shutdown(socket.SHUT_WR)
        closed_by_peer([sock])
    world.members[0].engine.failed.clear()


def test_out_of_descriptors() -> None:
    """Connections wait while there is no descriptor, and are served once there is one."""
    address = fresh_address()
    process = subprocess.Popen(
        [sys.executable, "-m", "aiocomm._control.testing", address, "0", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        guest = Member(address, 1, 2)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"ready 0")
        card = guest.joined().peers[0]
        limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        used = max(int(name) for name in os.listdir(f"/proc/{process.pid}/fd")) + 1
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (used, limits[1]))
        guest.plane.request_pair(card.rank)
        waiting = dial(parse(card.addresses[0]))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
        guest.engine.wait(lambda engine: 0 in engine.attached)
        waiting.close()
        guest.close()
        process.send_signal(signal.SIGKILL)

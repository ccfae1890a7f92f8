"""The raw endpoint against itself: it reports what verbs promise. The link is judged by it elsewhere."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("pyverbs.device", reason="Debian's pyverbs needs Debian's version of Python")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import rawverbs
from rawverbs import ALL_ACCESS, Completion, RawEndpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    Ends = tuple[RawEndpoint, RawEndpoint]


def connected(access: int = ALL_ACCESS, rail: int = 0) -> Ends:
    """Host a and host b on one rail; `access` is what b's buffer allows."""
    a, b = RawEndpoint(f"rxea{rail}"), RawEndpoint(f"rxeb{rail}", access=access)
    cards = a.card(), b.card()
    a.connect(cards[1])
    b.connect(cards[0])
    return a, b


@pytest.fixture
def ends() -> Iterator[Ends]:
    a, b = connected()
    yield a, b
    a.close()
    b.close()


def target(end: RawEndpoint, offset: int = 0) -> tuple[int, int]:
    card = end.card()
    return card["address"] + offset, card["rkey"]


@pytest.mark.parametrize("immediate", [None, 0, 0xA1B2C3D4])
def test_send(ends: Ends, immediate: int | None) -> None:
    a, b = ends
    a.write_buffer(b"hello")
    wanted = b.receive(64)
    sent = a.post("send", 5, immediate=immediate)
    assert (a.completion().id, a.has_none()) == (sent, True)
    assert b.completion() == Completion(wanted, "success", "received", 5, immediate)
    assert b.read_buffer(5) == b"hello"


@pytest.mark.parametrize("immediate", [0, 7, 0xFFFFFFFF])
def test_write_with_immediate_is_told(ends: Ends, immediate: int) -> None:
    a, b = ends
    a.write_buffer(b"x" * 5000)
    wanted = b.receive(0)
    a.post("write", 5000, to=target(b, 100), immediate=immediate)
    assert a.completion().status == "success"
    assert b.completion() == Completion(wanted, "success", "written with immediate", 5000, immediate)
    assert b.read_buffer(5000, 100) == b"x" * 5000


def test_plain_write_and_read_are_not_told(ends: Ends) -> None:
    a, b = ends
    a.write_buffer(b"left")
    a.post("write", 4, to=target(b))
    assert a.completion().opcode == "write"
    assert b.read_buffer(4) == b"left"
    b.write_buffer(b"read")
    a.post("read", 4, to=target(b))
    assert a.completion().opcode == "read"
    assert a.read_buffer(4) == b"read"
    assert b.has_none()


@pytest.mark.parametrize("opcode", ["write", "read"])
def test_a_released_key_is_refused(ends: Ends, opcode: str) -> None:
    a, b = ends
    to = target(b)
    b.release()
    a.post(opcode, 8, to=to)
    assert a.completion().status == "remote access error"


@pytest.mark.parametrize(
    ("opcode", "offset", "nbytes"),
    [
        (opcode, offset, nbytes)
        for opcode, (offset, nbytes) in itertools.product(
            ("write", "read"), [(-1, 8), (65535, 2), (65536, 1)]
        )
    ],
)
def test_outside_of_the_region_is_refused(ends: Ends, opcode: str, offset: int, nbytes: int) -> None:
    a, b = ends
    b.write_buffer(bytes(65536))
    a.write_buffer(b"!" * nbytes)
    a.post(opcode, nbytes, to=target(b, offset))
    assert a.completion().status == "remote access error"
    assert b.read_buffer(65536) == bytes(65536)


def test_what_was_not_granted_is_refused() -> None:
    from pyverbs import enums

    a, b = connected(access=enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_READ)
    with a, b:
        b.write_buffer(b"mine")
        a.post("read", 4, to=target(b))
        assert a.completion().status == "success"
        a.write_buffer(b"evil")
        a.post("write", 4, to=target(b))
        assert a.completion().status == "remote access error"
        assert b.read_buffer(4) == b"mine"


def test_the_second_rail_works_alone() -> None:
    a, b = connected(rail=1)
    with a, b:
        b.receive(64)
        a.post("send", 3)
        assert b.completion().nbytes == 3


def test_cards_are_swapped_over_a_socket() -> None:
    import socket
    from concurrent.futures import ThreadPoolExecutor

    left, right = socket.socketpair()
    with left, right, ThreadPoolExecutor(1) as pool:
        other = pool.submit(rawverbs.swap, right, {"qpn": 1, "gid": "x" * 10_000})
        assert rawverbs.swap(left, {"qpn": 2})["qpn"] == 1
        assert other.result() == {"qpn": 2}
    left, right = socket.socketpair()
    with left:
        right.close()
        with pytest.raises((ConnectionError, BrokenPipeError)):
            rawverbs.swap(left, {})

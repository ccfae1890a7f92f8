"""The control codec: bounds, strictness, and how it parses in portions."""

from __future__ import annotations

import dataclasses

import pytest

from aiocomm._control import wire
from aiocomm._control.wire import FrameParser, PeerCard, ProtocolError, decode, encode

CARD = PeerCard(
    rank=3,
    generation=2**40,
    name=None,
    host="knoten-ä",
    host_id="boot/1",
    pid=77,
    pid_namespace=4026531836,
    start_time=12345,
    devices=(),
    links=("shm", "tcp"),
    addresses=("unix://@x", "tcp://[::1]:5"),
)

MESSAGES: list[wire.Message] = [
    wire.Join(None, None, (), CARD),
    wire.Join(0, 4, ("aa", "bb"), dataclasses.replace(CARD, name="decode-3")),
    wire.Welcome(0, None, 1, None, "world", b""),
    wire.Welcome(1, 4, 2**62, 0, "world", b"k" * 32),
    wire.Refused("no", True),
    wire.Joined(CARD),
    wire.Ready(),
    wire.Gone(1, 2, False, "died"),
    wire.Heartbeat(),
    wire.Goodbye(),
    wire.Farewell(),
    wire.Offer(b"a" * 16, 0, 1, 2, 3),
    wire.OfferAnswer("accept", ""),
    wire.LinkTry("tcp", 3, b"\0" * 4096),
    wire.StreamHello(b"a" * 16, "tcp", 2),
    wire.LinkReady("shm", b""),
    wire.Attached("shm"),
    wire.Unattached("shm", "broken"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: wire.Message) -> None:
    assert FrameParser().feed(encode(message)) == [message]


def test_every_message_type_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(wire.Message.__args__)


@pytest.mark.parametrize("portion", [1, 3, 7, 1000])
def test_portions_do_not_matter(portion: int) -> None:
    data = b"".join(map(encode, MESSAGES))
    parser = FrameParser()
    found = [
        message for at in range(0, len(data), portion) for message in parser.feed(data[at : at + portion])
    ]
    assert found == MESSAGES
    assert parser.idle


def test_a_reader_that_takes_what_is_wanted_reads_nothing_beyond_the_frame() -> None:
    data = encode(MESSAGES[0]) + b"the link's first bytes"
    parser = FrameParser()
    messages: list[wire.Message] = []
    at = 0
    while not messages:
        step = parser.wanted
        messages = parser.feed(data[at : at + step])
        at += step
    assert messages == [MESSAGES[0]]
    assert data[at:] == b"the link's first bytes"


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_no_prefix_and_no_extension_of_a_body_is_valid(message: wire.Message) -> None:
    frame = encode(message)
    code, body = frame[3], frame[8:]
    for length in range(len(body)):
        with pytest.raises(ProtocolError):
            decode(code, body[:length])
    with pytest.raises(ProtocolError, match="too many"):
        decode(code, body + b"\0")


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"XX\x01\x08\0\0\0\0", "not an aiocomm"),
        (b"AC\x02\x08\0\0\0\0", "speaks control protocol 2"),
        (b"AC\x01\xff\0\0\0\0", "unknown control message type 255"),
        (b"AC\x01\x00\0\0\0\0", "unknown control message type 0"),
        (b"AC\x01\x01\0\1\0\0", "over the limit"),
        (b"AC\x01\x01\xff\xff\xff\xff", "over the limit"),
    ],
)
def test_a_bad_header_is_refused_before_the_body_comes(header: bytes, complaint: str) -> None:
    parser = FrameParser()
    with pytest.raises(ProtocolError, match=complaint):
        parser.feed(header)
    with pytest.raises(ProtocolError, match="already"):
        parser.feed(encode(wire.Ready()))


def test_an_empty_body_where_fields_belong() -> None:
    with pytest.raises(ProtocolError, match="too early"):
        FrameParser().feed(b"AC\x01\x01\0\0\0\0")


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (wire.Refused("x" * (wire.MAX_TEXT + 1), False), "text"),
        (wire.LinkReady("shm", b"x" * (wire.MAX_BYTES + 1)), "bytes"),
        (wire.Joined(dataclasses.replace(CARD, links=("x",) * (wire.MAX_ITEMS + 1))), "items"),
        (wire.Gone(-1, 0, False, ""), "does not fit"),
        (wire.Gone(2**63, 0, False, ""), "does not fit"),
        (wire.Joined(dataclasses.replace(CARD, addresses=("x" * 1024,) * 64)), "more than a frame"),
    ],
)
def test_what_is_out_of_bounds_is_not_sent(message: wire.Message, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        encode(message)


def test_a_peer_that_ignores_the_bounds_is_refused() -> None:
    long_text = (wire.MAX_TEXT + 1).to_bytes(2, "big") + b"x" * (wire.MAX_TEXT + 1)
    with pytest.raises(ProtocolError, match="over the limit"):
        decode(wire.Refused.CODE, long_text + b"\0")
    with pytest.raises(ProtocolError, match="neither 0 nor 1"):
        decode(wire.Refused.CODE, b"\0\0\2")
    with pytest.raises(ProtocolError, match="UTF-8"):
        decode(wire.Refused.CODE, b"\0\1\xff\0")
    with pytest.raises(ProtocolError, match="out of range"):
        decode(wire.Gone.CODE, b"\xff" * 8 + b"\0" * 11)

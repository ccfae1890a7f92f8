"""The control codec: bounds, strictness, and how it parses in portions."""

from __future__ import annotations

import dataclasses

import pytest

from aiocomm._control import messages, wire
from aiocomm._control.auth import TAG_SIZE, Seal
from aiocomm._control.messages import PeerCard
from aiocomm._control.wire import FrameParser, ProtocolError, decode, encode
from aiocomm.errors import AuthenticationError

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

MESSAGES: list[messages.Message] = [
    messages.Join(None, None, (), CARD),
    messages.Join(0, 4, ("aa", "bb"), dataclasses.replace(CARD, name="decode-3")),
    messages.Welcome(0, None, 1, None, "world", b""),
    messages.Welcome(1, 4, 2**62, 0, "world", b"k" * 32),
    messages.Refused("no", True),
    messages.Joined((CARD,)),
    messages.Joined(()),
    messages.Ready(),
    messages.Gone(1, 2, False, "died"),
    messages.Heartbeat(),
    messages.Goodbye(),
    messages.Farewell(),
    messages.Offer(b"a" * 16, 0, 1, 2, 3),
    messages.OfferAnswer("accept", ""),
    messages.LinkTry("tcp", 3, False, b"\0" * 4096),
    messages.StreamHello(b"a" * 16, "tcp", 2),
    messages.LinkReady("shm", b""),
    messages.Attached("shm"),
    messages.Unattached("shm", "broken"),
    messages.Watch(0, 1, 2, 3),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: messages.Message) -> None:
    assert FrameParser().feed(encode(message)) == [message]


def test_every_message_type_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(messages.Message.__args__)


@pytest.mark.parametrize("portion", [1, 3, 7, 1000])
def test_portions_do_not_matter(portion: int) -> None:
    data = b"".join(map(encode, MESSAGES))
    parser = FrameParser()
    found = [
        message for at in range(0, len(data), portion) for message in parser.feed(data[at : at + portion])
    ]
    assert found == MESSAGES
    assert parser.idle


@pytest.mark.parametrize("seal", [False, True])
def test_a_reader_that_takes_what_is_wanted_reads_nothing_beyond_the_frame(seal: bool) -> None:
    frame = encode(MESSAGES[0])
    data = frame + (Seal(b"k").tag(frame) if seal else b"") + b"the link's first bytes"
    parser = FrameParser(Seal(b"k") if seal else None)
    found: list[messages.Message] = []
    at = 0
    while not found:
        step = parser.wanted
        found = parser.feed(data[at : at + step])
        at += step
    assert found == [MESSAGES[0]]
    assert data[at:] == b"the link's first bytes"


@pytest.mark.parametrize("portion", [1, 5, 100_000])
def test_sealed_frames(portion: int) -> None:
    sender = Seal(b"key")
    data = b"".join(frame + sender.tag(frame) for frame in map(encode, MESSAGES))
    parser = FrameParser(Seal(b"key"))
    found = [
        message for at in range(0, len(data), portion) for message in parser.feed(data[at : at + portion])
    ]
    assert found == MESSAGES


@pytest.mark.parametrize("trick", ["another key", "changed", "replayed", "dropped", "no tag"])
def test_a_frame_that_is_not_the_other_ends_is_not_decoded(trick: str) -> None:
    sender = Seal(b"other" if trick == "another key" else b"key")
    first, second = (
        frame + sender.tag(frame)
        for frame in (encode(messages.Goodbye()), encode(messages.Refused("x", True)))
    )
    data = {
        "another key": first + second,
        "changed": first + second.replace(b"x", b"y"),
        "replayed": first + first,
        "dropped": second,
        "no tag": first[:-TAG_SIZE] + second,
    }[trick]
    parser = FrameParser(Seal(b"key"))
    with pytest.raises(AuthenticationError):
        parser.feed(data)
    with pytest.raises(ProtocolError, match="already"):
        parser.feed(first)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_no_prefix_and_no_extension_of_a_body_is_valid(message: messages.Message) -> None:
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
        parser.feed(encode(messages.Ready()))


def test_an_empty_body_where_fields_belong() -> None:
    with pytest.raises(ProtocolError, match="too early"):
        FrameParser().feed(b"AC\x01\x01\0\0\0\0")


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (messages.Refused("x" * (wire.MAX_TEXT + 1), False), "text"),
        (messages.LinkReady("shm", b"x" * (wire.MAX_BYTES + 1)), "bytes"),
        (messages.Joined((dataclasses.replace(CARD, links=("x",) * (wire.MAX_ITEMS + 1)),)), "items"),
        (messages.Gone(-1, 0, False, ""), "does not fit"),
        (messages.Gone(2**63, 0, False, ""), "does not fit"),
        (messages.Joined((dataclasses.replace(CARD, addresses=("x" * 1024,) * 64),)), "more than a frame"),
    ],
)
def test_what_is_out_of_bounds_is_not_sent(message: messages.Message, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        encode(message)


def test_a_peer_that_ignores_the_bounds_is_refused() -> None:
    long_text = (wire.MAX_TEXT + 1).to_bytes(2, "big") + b"x" * (wire.MAX_TEXT + 1)
    with pytest.raises(ProtocolError, match="over the limit"):
        decode(messages.Refused.CODE, long_text + b"\0")
    with pytest.raises(ProtocolError, match="neither 0 nor 1"):
        decode(messages.Refused.CODE, b"\0\0\2")
    with pytest.raises(ProtocolError, match="UTF-8"):
        decode(messages.Refused.CODE, b"\0\1\xff\0")
    with pytest.raises(ProtocolError, match="out of range"):
        decode(messages.Gone.CODE, b"\xff" * 8 + b"\0" * 11)


@pytest.mark.parametrize("long", [0, 60])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_cards_encoded_once_make_the_frames_of_the_messages(count: int, long: int) -> None:
    """Frames put together from cards are those of the messages, hold every card in order, and are few."""
    cards = [
        dataclasses.replace(CARD, rank=rank, addresses=("x" * 1000,) * (long if rank % 7 == 3 else 1))
        for rank in range(count)
    ]
    frames = wire.encode_joined(map(wire.encode_card, cards))
    told = [message for frame in frames for message in wire.FrameParser().feed(frame)]
    assert [card for message in told for card in message.cards] == cards  # type: ignore[union-attr]
    assert list(map(wire.encode, told)) == frames
    assert all(len(frame) <= wire.MAX_FRAME for frame in frames)
    if not long:
        assert len(frames) == -(-count // wire.MAX_ITEMS)


def test_a_card_that_fits_no_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="more than a frame"):
        wire.encode_card(dataclasses.replace(CARD, addresses=("x" * 1024,) * 64))

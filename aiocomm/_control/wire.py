"""Control frames: a bounded, versioned, typed codec, and a parser that is fed bytes.

A frame is a header of 8 bytes (magic, version, type, body length, big endian) and a body. The body is the
fields of one of a class of `messages`, in order, by their annotated types: there are no tags, no nesting
beyond a peer card and no optional trailing data, so every body has exactly one meaning or is refused.

Rules:
1. A frame is at most `MAX_FRAME` bytes; the header is judged before the body is read.
2. Strings, byte strings and tuples have their own bounds, checked when encoding and when decoding.
3. An unknown version or type, a value out of bounds, or a byte too few or too many is a `ProtocolError`; the
   parser is then dead, and so is the connection.
4. `FrameParser.wanted` says how many bytes complete the next step. A reader that never takes more leaves the
   bytes behind the last frame in the socket, for whoever owns the socket next.
"""

from __future__ import annotations

import dataclasses
import struct
import types
import typing
from typing import TYPE_CHECKING, Any, Final

from aiocomm._control.auth import TAG_SIZE
from aiocomm._control.messages import Joined, Message, PeerCard
from aiocomm.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiocomm._control.auth import Seal

__all__ = [
    "MAX_BYTES",
    "MAX_FRAME",
    "MAX_ITEMS",
    "MAX_TEXT",
    "VERSION",
    "FrameParser",
    "ProtocolError",
    "decode",
    "encode",
    "encode_card",
    "encode_joined",
]

VERSION: Final = 1
MAX_FRAME: Final = 64 * 1024
"""Bytes of a frame, header included."""
MAX_TEXT: Final = 1024
"""Bytes of a string, as UTF-8."""
MAX_BYTES: Final = 8 * 1024
"""Bytes of a byte string."""
MAX_ITEMS: Final = 64
"""Items of a tuple."""

_MAGIC: Final = b"AC"
_HEADER: Final = struct.Struct("!2sBBI")


class ProtocolError(PeerError):
    """The other end sent something that this protocol does not allow."""


_TYPES: Final[dict[int, type[Any]]] = {cls.CODE: cls for cls in typing.get_args(Message)}
_FIELDS: Final[dict[type[Any], tuple[tuple[str, Any], ...]]] = {
    cls: tuple((field.name, typing.get_type_hints(cls)[field.name]) for field in dataclasses.fields(cls))
    for cls in (*_TYPES.values(), PeerCard)
}


def encode(message: Message) -> bytes:
    """The frame of a message.

    Raises:
        ValueError: a field is out of its bounds.
    """
    body = bytearray()
    _put_fields(body, message)
    if _HEADER.size + len(body) > MAX_FRAME:
        raise ValueError(f"{type(message).__name__} takes {len(body)} bytes, more than a frame holds")
    return _HEADER.pack(_MAGIC, VERSION, message.CODE, len(body)) + body


def encode_card(card: PeerCard) -> bytes:
    """A card as it stands in a frame, to be encoded once for everyone who is told of it.

    Raises:
        ValueError: a field is out of its bounds.
    """
    body = bytearray()
    _put_fields(body, card)
    if _HEADER.size + 1 + len(body) > MAX_FRAME:
        raise ValueError(f"a card takes {len(body)} bytes, more than a frame holds")
    return bytes(body)


def encode_joined(cards: Iterable[bytes]) -> list[bytes]:
    """The frames of `Joined` messages that tell of cards from `encode_card`: as few as can be."""
    frames: list[bytes] = []
    group: list[bytes] = []
    nbytes = 0

    def close() -> None:
        body = len(group).to_bytes(1, "big") + b"".join(group)
        frames.append(_HEADER.pack(_MAGIC, VERSION, Joined.CODE, len(body)) + body)

    for card in cards:
        if group and (len(group) == MAX_ITEMS or _HEADER.size + 1 + nbytes + len(card) > MAX_FRAME):
            close()
            group, nbytes = [], 0
        group.append(card)
        nbytes += len(card)
    if group:
        close()
    return frames


def decode(code: int, body: bytes) -> Message:
    """The message of a frame's type and body.

    Raises:
        ProtocolError: the body is not exactly one message of that type.
    """
    cls = _TYPES.get(code)
    if cls is None:
        raise ProtocolError(f"unknown control message type {code}")
    reader = _Reader(body)
    message = _take_fields(reader, cls)
    if reader.rest:
        raise ProtocolError(f"{reader.rest} bytes too many in a {cls.__name__} message")
    return typing.cast("Message", message)


class FrameParser:
    """Turns bytes into messages. Fed at most `wanted` bytes, it leaves later ones in the socket.

    Args:
        seal: of the direction: each frame is then followed by its tag, and is not decoded before that is
            checked.
    """

    def __init__(self, seal: Seal | None = None) -> None:
        self._seal = seal
        self._tag_size = TAG_SIZE if seal is not None else 0
        self._buffer = bytearray()
        self._length: int | None = None  # of the frame and its tag, once the header is judged
        self._dead = False

    @property
    def wanted(self) -> int:
        """Bytes that are missing from the current header, or from the frame and its tag."""
        return (_HEADER.size if self._length is None else self._length) - len(self._buffer)

    @property
    def idle(self) -> bool:
        """True between frames: an end of file here cuts nothing off."""
        return not self._buffer

    def feed(self, data: bytes) -> list[Message]:
        """Take bytes, in any portions; return the messages that they complete.

        Raises:
            ProtocolError: the bytes are not frames of this protocol; the parser accepts nothing more.
            AuthenticationError: a tag is wrong; the same.
        """
        if self._dead:
            raise ProtocolError("the connection already broke the protocol")
        messages: list[Message] = []
        view = memoryview(data)
        try:
            while True:
                portion = view[: self.wanted]
                self._buffer += portion
                view = view[len(portion) :]
                if self._length is None and not self.wanted:
                    self._length = self._judge_header()
                if self.wanted:
                    if not view:
                        return messages
                    continue
                messages.append(self._take_frame())
        except PeerError:
            self._dead = True
            self._buffer.clear()
            raise

    def _judge_header(self) -> int:
        magic, version, code, length = _HEADER.unpack(self._buffer)
        if magic != _MAGIC:
            raise ProtocolError("not an aiocomm control frame")
        if version != VERSION:
            raise ProtocolError(f"the peer speaks control protocol {version}, this side {VERSION}")
        if code not in _TYPES:
            raise ProtocolError(f"unknown control message type {code}")
        if _HEADER.size + length > MAX_FRAME:
            raise ProtocolError(f"a control frame of {length} bytes is over the limit of {MAX_FRAME}")
        return int(_HEADER.size + length + self._tag_size)

    def _take_frame(self) -> Message:
        end = len(self._buffer) - self._tag_size
        frame, tag = bytes(self._buffer[:end]), bytes(self._buffer[end:])
        self._buffer.clear()
        self._length = None
        if self._seal is not None:
            self._seal.check(frame, tag)
        return decode(frame[3], frame[_HEADER.size :])


class _Reader:
    """A cursor over a body that never reads past its end."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    @property
    def rest(self) -> int:
        return len(self._body) - self._at

    def take(self, nbytes: int) -> bytes:
        if nbytes > self.rest:
            raise ProtocolError("a control message ends too early")
        self._at += nbytes
        return self._body[self._at - nbytes : self._at]

    def unsigned(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "big")


def _put_fields(body: bytearray, value: Any) -> None:
    for name, kind in _FIELDS[type(value)]:
        _put(body, kind, getattr(value, name))


def _take_fields(reader: _Reader, cls: type[Any]) -> Any:
    return cls(**{name: _take(reader, kind) for name, kind in _FIELDS[cls]})


def _put(body: bytearray, kind: Any, value: Any) -> None:
    if isinstance(kind, types.UnionType):  # X | None
        body.append(value is not None)
        if value is not None:
            _put(body, kind.__args__[0], value)
    elif kind is bool:
        body.append(bool(value))
    elif kind is int:
        if not 0 <= value < 2**63:
            raise ValueError(f"{value} does not fit the wire")
        body += value.to_bytes(8, "big")
    elif kind is str:
        text = value.encode()
        if len(text) > MAX_TEXT:
            raise ValueError(f"a text of {len(text)} bytes is over the limit of {MAX_TEXT}")
        body += len(text).to_bytes(2, "big") + text
    elif kind is bytes:
        if len(value) > MAX_BYTES:
            raise ValueError(f"{len(value)} bytes are over the limit of {MAX_BYTES}")
        body += len(value).to_bytes(2, "big") + value
    elif typing.get_origin(kind) is tuple:
        if len(value) > MAX_ITEMS:
            raise ValueError(f"{len(value)} items are over the limit of {MAX_ITEMS}")
        body.append(len(value))
        for item in value:
            _put(body, typing.get_args(kind)[0], item)
    else:
        _put_fields(body, value)


def _take(reader: _Reader, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        return _take(reader, kind.__args__[0]) if _flag(reader) else None
    if kind is bool:
        return _flag(reader)
    if kind is int:
        value = reader.unsigned(8)
        if value >= 2**63:
            raise ProtocolError("a number in a control message is out of range")
        return value
    if kind is str:
        text = reader.take(_bounded(reader.unsigned(2), MAX_TEXT))
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError("a text in a control message is not UTF-8") from error
    if kind is bytes:
        return reader.take(_bounded(reader.unsigned(2), MAX_BYTES))
    if typing.get_origin(kind) is tuple:
        count = _bounded(reader.unsigned(1), MAX_ITEMS)
        return tuple(_take(reader, typing.get_args(kind)[0]) for _ in range(count))
    return _take_fields(reader, kind)


def _flag(reader: _Reader) -> bool:
    value = reader.unsigned(1)
    if value > 1:
        raise ProtocolError("a truth value in a control message is neither 0 nor 1")
    return bool(value)


def _bounded(length: int, limit: int) -> int:
    if length > limit:
        raise ProtocolError(f"a length of {length} in a control message is over the limit of {limit}")
    return length

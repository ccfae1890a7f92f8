"""Control frames: a bounded, versioned, typed codec, and a parser that is fed bytes.

A frame is a header of 8 bytes (magic, version, type, body length, big endian) and a body. The body is the
fields of one of the message classes below, in order, by their annotated types: there are no tags, no nesting
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
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

from aiocomm.errors import PeerError

__all__ = [
    "MAX_BYTES",
    "MAX_FRAME",
    "MAX_ITEMS",
    "MAX_TEXT",
    "VERSION",
    "Attached",
    "Farewell",
    "FrameParser",
    "Gone",
    "Goodbye",
    "Heartbeat",
    "Join",
    "Joined",
    "LinkReady",
    "LinkTry",
    "Message",
    "Offer",
    "OfferAnswer",
    "PeerCard",
    "ProtocolError",
    "Ready",
    "Refused",
    "StreamHello",
    "Unattached",
    "Welcome",
    "decode",
    "encode",
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


@dataclass(frozen=True, slots=True)
class PeerCard:
    """A process as the others need to know it. `addresses` are where it accepts pair connections."""

    rank: int
    generation: int
    name: str | None
    host: str
    host_id: str
    pid: int
    pid_namespace: int
    start_time: int
    devices: tuple[str, ...]
    links: tuple[str, ...]
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Join:
    """Member to rendezvous: let me in. `rank` and `size` are None in an elastic world.

    `left` names the worlds that this process has left for good, so that a second world at the same address is
    not mistaken for the first one, which may still be closing.
    """

    CODE: ClassVar[int] = 1
    rank: int | None
    size: int | None
    left: tuple[str, ...]
    card: PeerCard


@dataclass(frozen=True, slots=True)
class Welcome:
    """Rendezvous to member: you are in. `host_rank` lives in the process of the rendezvous; None if it stands
    alone.

    `session_key` is empty where the group has a token.
    """

    CODE: ClassVar[int] = 2
    rank: int
    size: int | None
    generation: int
    host_rank: int | None
    world: str
    session_key: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """Rendezvous to member: you are not in. With `retry`, another try may succeed."""

    CODE: ClassVar[int] = 3
    reason: str
    retry: bool


@dataclass(frozen=True, slots=True)
class Joined:
    """Rendezvous to member: this peer is in the world."""

    CODE: ClassVar[int] = 4
    card: PeerCard


@dataclass(frozen=True, slots=True)
class Ready:
    """Rendezvous to member: everyone that belongs to the world from the start has been told of."""

    CODE: ClassVar[int] = 5


@dataclass(frozen=True, slots=True)
class Gone:
    """Rendezvous to member: this peer left (`graceful`) or was lost."""

    CODE: ClassVar[int] = 6
    rank: int
    generation: int
    graceful: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Both ways, across hosts: the kernel of the other end must acknowledge it in time."""

    CODE: ClassVar[int] = 7


@dataclass(frozen=True, slots=True)
class Goodbye:
    """Member to rendezvous: I leave."""

    CODE: ClassVar[int] = 8


@dataclass(frozen=True, slots=True)
class Farewell:
    """Rendezvous to member: your goodbye is known to all, or this rendezvous closes. Nothing follows."""

    CODE: ClassVar[int] = 9


@dataclass(frozen=True, slots=True)
class Offer:
    """Caller to called: let us connect. `attempt` names this try and is secret enough to be claimed by its
    maker only.
    """

    CODE: ClassVar[int] = 16
    attempt: bytes
    rank: int
    generation: int
    to_rank: int
    to_generation: int


@dataclass(frozen=True, slots=True)
class OfferAnswer:
    """Called to caller. `verdict` is "accept", "yield" (my own call to you takes precedence), "done" or
    "refuse".
    """

    CODE: ClassVar[int] = 17
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True)
class LinkTry:
    """Caller to called: use this link; its `streams` connections follow as connections of their own."""

    CODE: ClassVar[int] = 18
    link: str
    streams: int
    card: bytes


@dataclass(frozen=True, slots=True)
class StreamHello:
    """First and only frame of a connection that then belongs to the link."""

    CODE: ClassVar[int] = 19
    attempt: bytes
    link: str
    index: int


@dataclass(frozen=True, slots=True)
class LinkReady:
    """Called to caller: all streams are here; attach."""

    CODE: ClassVar[int] = 20
    link: str
    card: bytes


@dataclass(frozen=True, slots=True)
class Attached:
    """Both ways: my engine has taken the link."""

    CODE: ClassVar[int] = 21
    link: str


@dataclass(frozen=True, slots=True)
class Unattached:
    """Both ways: this link cannot be used between us; try the next."""

    CODE: ClassVar[int] = 22
    link: str
    reason: str


Message: TypeAlias = (
    Join
    | Welcome
    | Refused
    | Joined
    | Ready
    | Gone
    | Heartbeat
    | Goodbye
    | Farewell
    | Offer
    | OfferAnswer
    | LinkTry
    | StreamHello
    | LinkReady
    | Attached
    | Unattached
)

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
    """Turns bytes into messages. Fed at most `wanted` bytes, it leaves later ones in the socket."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._body: tuple[int, int] | None = None  # (type, length) once the header is judged
        self._dead = False

    @property
    def wanted(self) -> int:
        """Bytes that are missing from the current header or body."""
        length = _HEADER.size if self._body is None else self._body[1]
        return length - len(self._buffer)

    @property
    def idle(self) -> bool:
        """True between frames: an end of file here cuts nothing off."""
        return self._body is None and not self._buffer

    def feed(self, data: bytes) -> list[Message]:
        """Take bytes, in any portions; return the messages that they complete.

        Raises:
            ProtocolError: the bytes are not frames of this protocol; the parser accepts nothing more.
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
                if self.wanted:
                    return messages
                message = self._step()
                if message is not None:
                    messages.append(message)
        except ProtocolError:
            self._dead = True
            self._buffer.clear()
            raise

    def _step(self) -> Message | None:
        if self._body is None:
            magic, version, code, length = _HEADER.unpack(self._buffer)
            if magic != _MAGIC:
                raise ProtocolError("not an aiocomm control frame")
            if version != VERSION:
                raise ProtocolError(f"the peer speaks control protocol {version}, this side {VERSION}")
            if code not in _TYPES:
                raise ProtocolError(f"unknown control message type {code}")
            if _HEADER.size + length > MAX_FRAME:
                raise ProtocolError(f"a control frame of {length} bytes is over the limit of {MAX_FRAME}")
            self._buffer.clear()
            self._body = (code, length)
            if length:
                return None
        code, _ = self._body
        body = bytes(self._buffer)
        self._buffer.clear()
        self._body = None
        return decode(code, body)


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

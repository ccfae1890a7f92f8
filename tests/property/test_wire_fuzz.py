"""The control codec and parser against arbitrary messages and arbitrary bytes."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aiocomm._control import messages, wire
from aiocomm._control.wire import FrameParser, ProtocolError, encode

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Whatever a field of that type may hold."""
    if isinstance(kind, types.UnionType):
        return st.none() | values(kind.__args__[0])
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(0, 2**63 - 1)
    if kind is str:
        return _TEXT
    if kind is bytes:
        return st.binary(max_size=wire.MAX_BYTES)
    if typing.get_origin(kind) is tuple:
        return st.lists(values(typing.get_args(kind)[0]), max_size=8).map(tuple)
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values(hints[field.name]) for field in dataclasses.fields(kind)})


MESSAGES = st.one_of([values(cls) for cls in messages.Message.__args__])


@given(st.lists(MESSAGES, max_size=4), st.data())
def test_any_messages_in_any_portions(sent: list[messages.Message], data: st.DataObject) -> None:
    stream = b"".join(map(encode, sent))
    parser, got, at = FrameParser(), [], 0
    while at < len(stream):
        step = data.draw(st.integers(1, max(1, len(stream))))
        got += parser.feed(stream[at : at + step])
        at += step
    assert got == sent
    assert parser.idle


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_arbitrary_bytes_are_messages_or_a_protocol_error(portions: list[bytes]) -> None:
    parser = FrameParser()
    for portion in portions:
        try:
            for message in parser.feed(portion):
                assert encode(message)
        except ProtocolError:
            assert parser.wanted <= wire.MAX_FRAME
            return
        assert 0 < parser.wanted <= wire.MAX_FRAME


@given(MESSAGES, st.data())
def test_a_changed_byte_gives_another_message_or_a_protocol_error(
    message: messages.Message, data: st.DataObject
) -> None:
    frame = bytearray(encode(message))
    position = data.draw(st.integers(0, len(frame) - 1))
    frame[position] ^= data.draw(st.integers(1, 255))
    parser = FrameParser()
    try:
        found = parser.feed(bytes(frame))
    except ProtocolError:
        return
    # One meaning per body: whatever was decoded encodes to the very bytes that were read.
    consumed = b"".join(map(encode, found))
    assert bytes(frame).startswith(consumed)
    assert message not in found


@given(st.sampled_from([cls.CODE for cls in messages.Message.__args__]), st.binary(max_size=2000))
def test_a_body_has_one_meaning_at_most(code: int, body: bytes) -> None:
    try:
        message = wire.decode(code, body)
    except ProtocolError:
        return
    assert encode(message)[8:] == body

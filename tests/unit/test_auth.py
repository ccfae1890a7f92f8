"""The handshake, without sockets."""

from __future__ import annotations

from itertools import product

import pytest

from aiocomm._control.auth import (
    HELLO_SIZE,
    PROOF_SIZE,
    VERDICT_SIZE,
    Called,
    Caller,
    Mode,
    Purpose,
    derive_key,
)
from aiocomm.errors import AuthenticationError, UsageError


def shake(caller: Caller, called: Called) -> bool:
    """Run the four messages; returns whether the called side accepted. Raises what the caller raises."""
    hello = caller.hello()
    called.challenge(hello)
    answer = called.hello()
    proof = caller.answer(answer)
    accepted, verdict = called.verdict(proof)
    assert (len(hello), len(answer), len(proof), len(verdict)) == (
        HELLO_SIZE,
        HELLO_SIZE,
        PROOF_SIZE,
        VERDICT_SIZE,
    )
    caller.finish(verdict)
    return accepted


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("key", [b"secret", b"x" * 1000, None])
def test_the_same_key_opens(key: bytes | None, purpose: Purpose) -> None:
    assert shake(Caller(key, purpose), Called(key, purpose))


def test_another_key_is_refused_on_both_sides() -> None:
    caller, called = Caller(b"one", Purpose.PAIR), Called(b"two", Purpose.PAIR)
    called.challenge(caller.hello())
    accepted, verdict = called.verdict(caller.answer(called.hello()))
    assert not accepted
    with pytest.raises(AuthenticationError, match="AIOCOMM_TOKEN differs"):
        caller.finish(verdict)


def test_the_called_side_must_know_the_key_too() -> None:
    caller, called = Caller(b"one", Purpose.PAIR), Called(b"one", Purpose.PAIR)
    called.challenge(caller.hello())
    caller.answer(called.hello())
    with pytest.raises(AuthenticationError, match="does not know"):
        caller.finish(b"\0" + bytes(PROOF_SIZE))


@pytest.mark.parametrize(("one", "other"), [(b"key", None), (None, b"key")])
def test_token_and_no_token_do_not_mix(one: bytes | None, other: bytes | None) -> None:
    with pytest.raises(AuthenticationError, match="same AIOCOMM_TOKEN"):
        Called(one, Purpose.PAIR).challenge(Caller(other, Purpose.PAIR).hello())
    with pytest.raises(AuthenticationError, match="same AIOCOMM_TOKEN"):
        Caller(one, Purpose.PAIR).answer(Called(other, Purpose.PAIR).hello())


def test_a_connection_for_one_purpose_does_not_open_another() -> None:
    with pytest.raises(AuthenticationError, match="kind"):
        Called(b"key", Purpose.PAIR).challenge(Caller(b"key", Purpose.CONTROL).hello())


def test_a_proof_cannot_be_reflected() -> None:
    """Someone without the key calls back its caller and returns to it what it says itself."""
    victim, mirror = (
        Caller(b"key", Purpose.PAIR, nonce=b"n" * 32),
        Called(b"key", Purpose.PAIR, nonce=b"n" * 32),
    )
    mirror.challenge(victim.hello())
    proof = victim.answer(victim.hello())
    with pytest.raises(AuthenticationError, match="does not know"):
        victim.finish(b"\0" + proof)


def test_a_proof_is_good_for_one_handshake() -> None:
    first = Called(b"key", Purpose.PAIR)
    caller = Caller(b"key", Purpose.PAIR)
    first.challenge(caller.hello())
    proof = caller.answer(first.hello())
    assert first.verdict(proof)[0]
    second = Called(b"key", Purpose.PAIR)
    second.challenge(caller.hello())
    assert not second.verdict(proof)[0]


@pytest.mark.parametrize("position", range(8))
def test_every_header_byte_of_a_hello_counts(position: int) -> None:
    hello = bytearray(Caller(b"key", Purpose.PAIR).hello())
    hello[position] ^= 0x40
    with pytest.raises(AuthenticationError):
        Called(b"key", Purpose.PAIR).challenge(bytes(hello))


@pytest.mark.parametrize("size", [0, 1, HELLO_SIZE - 1, HELLO_SIZE + 1])
def test_a_hello_has_one_size(size: int) -> None:
    hello = (Caller(b"key", Purpose.PAIR).hello() + bytes(8))[:size]
    with pytest.raises(AuthenticationError):
        Called(b"key", Purpose.PAIR).challenge(hello)


def test_a_wrong_proof_of_any_length_is_refused() -> None:
    for length, fill in product([0, 1, PROOF_SIZE, PROOF_SIZE + 1], [0, 255]):
        called = Called(b"key", Purpose.PAIR)
        called.challenge(Caller(b"key", Purpose.PAIR).hello())
        assert not called.verdict(bytes([fill]) * length)[0]


def test_an_empty_token_is_an_error() -> None:
    with pytest.raises(UsageError, match="empty"):
        Caller(b"", Purpose.PAIR)


def test_nonces_differ() -> None:
    assert Caller(None, Purpose.PAIR).hello() != Caller(None, Purpose.PAIR).hello()


def test_derived_keys_differ_by_label_and_secret() -> None:
    keys = {derive_key(secret, label) for secret in (b"a", b"b") for label in ("x", "y")}
    assert len(keys) == 4
    assert Mode.UID != Mode.TOKEN


def test_seals_agree_by_direction_and_handshake() -> None:
    caller, called = Caller(b"key", Purpose.PAIR), Called(b"key", Purpose.PAIR)
    assert shake(caller, called)
    (caller_sends, caller_receives), (called_sends, called_receives) = caller.seals(), called.seals()
    frames = [b"one", b"two", b"two"]
    tags = [caller_sends.tag(frame) for frame in frames]
    assert len(set(tags)) == 3
    for frame, tag in zip(frames, tags, strict=True):
        called_receives.check(frame, tag)
    # The other direction, and another handshake, have other keys.
    with pytest.raises(AuthenticationError):
        caller_receives.check(b"one", tags[0])
    caller_again, called_again = Caller(b"key", Purpose.PAIR), Called(b"key", Purpose.PAIR)
    assert shake(caller_again, called_again)
    assert caller_again.seals()[0].tag(b"one") != tags[0]
    assert called_sends.tag(b"one") != tags[0]

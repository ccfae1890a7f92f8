"""Mutual authentication of a connection, before anything else on it is parsed. Pure: bytes in, bytes out.

    caller                                   called
    hello(mode, purpose, nonce_c)   ───►
                                    ◄───     hello(mode, purpose, nonce_s)
    proof_c                         ───►     checks
                                    ◄───     verdict, proof_s
    checks

A proof is HMAC-SHA256 over role, version, mode, purpose and both nonces, keyed with the group's token. The
role keeps a proof from being reflected, the purpose from being carried to another listener of the group. The
caller proves first, so that a listening port tells nothing to those who merely try it. Each message has one
fixed size.

Mode `UID` is for groups without a token. Its proofs prove nothing: the caller of this module must have
compared the credentials that the kernel gives for a Unix socket. A side has one mode and refuses the other.

What follows on the connection carries tags under keys of this very handshake (`Seal`), numbered by frame and
apart for the two directions, so that frames cannot be forged, replayed, dropped or reordered by someone on
the way. They can be read: for that there is TLS.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
from typing import Final

from aiocomm.errors import AuthenticationError, UsageError

__all__ = [
    "GIVE_TOKEN",
    "HELLO_SIZE",
    "PROOF_SIZE",
    "TAG_SIZE",
    "VERDICT_SIZE",
    "Called",
    "Caller",
    "Mode",
    "Purpose",
    "Seal",
    "derive_key",
]

_MAGIC: Final = b"AIOC"
_VERSION: Final = 1
_NONCE_SIZE: Final = 32
_OK: Final = b"\x00"
_REFUSED: Final = b"\x01"

HELLO_SIZE: Final = len(_MAGIC) + 4 + _NONCE_SIZE
"""Bytes of either hello."""
PROOF_SIZE: Final = 32
"""Bytes of the caller's proof."""
VERDICT_SIZE: Final = 1 + PROOF_SIZE
"""Bytes of the called side's verdict and proof."""

GIVE_TOKEN: Final = "set AIOCOMM_TOKEN_FILE, AIOCOMM_TOKEN or token= to the same secret everywhere"
"""What to do where a token is needed and there is none."""

TAG_SIZE: Final = 16
"""Bytes of the tag behind a frame."""


class Mode(enum.IntEnum):
    """How a group knows its own."""

    UID = 0
    TOKEN = 1


class Purpose(enum.IntEnum):
    """What a connection is for."""

    CONTROL = 1
    PAIR = 2


def derive_key(secret: bytes, label: str) -> bytes:
    """A key for one use, from the group's secret."""
    return hmac.digest(secret, b"aiocomm key\0" + label.encode(), hashlib.sha256)


class Seal:
    """Tags for the frames of one direction, in order."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._count = 0

    def tag(self, frame: bytes) -> bytes:
        """The tag of the next frame."""
        number = self._count.to_bytes(8, "big")
        self._count += 1
        return hmac.digest(self._key, number + frame, hashlib.sha256)[:TAG_SIZE]

    def check(self, frame: bytes, tag: bytes) -> None:
        """Take the next frame.

        Raises:
            AuthenticationError: the tag is not that frame's.
        """
        if not hmac.compare_digest(self.tag(frame), tag):
            raise AuthenticationError("a control frame was changed on its way, or is not the other end's")


class _Side:
    """What both roles share."""

    def __init__(self, key: bytes | None, purpose: Purpose, nonce: bytes | None = None) -> None:
        if key is not None and not key:
            raise UsageError("the group's token is empty; leave it out or give a real one")
        self._key = key or b""
        self._mode = Mode.TOKEN if key is not None else Mode.UID
        self._purpose = purpose
        self._nonce = os.urandom(_NONCE_SIZE) if nonce is None else nonce

    def _hello(self) -> bytes:
        return _MAGIC + bytes((_VERSION, self._mode, self._purpose, 0)) + self._nonce

    def _check_hello(self, hello: bytes) -> bytes:
        """The nonce of the other side's hello."""
        if len(hello) != HELLO_SIZE or not hello.startswith(_MAGIC):
            raise AuthenticationError("the other end is not aiocomm")
        version, mode, purpose, zero = hello[len(_MAGIC) : len(_MAGIC) + 4]
        if version != _VERSION:
            raise AuthenticationError(f"the other end speaks handshake {version}, this side {_VERSION}")
        if mode != self._mode:
            with_token = "this side has a token and the other has none"
            without = "the other end has a token and this side has none"
            detail = with_token if self._mode is Mode.TOKEN else without
            raise AuthenticationError(f"{detail}; give all processes the same AIOCOMM_TOKEN")
        if purpose != self._purpose or zero:
            raise AuthenticationError("the other end wants another kind of connection")
        return hello[-_NONCE_SIZE:]

    def _proof(self, role: bytes, caller_nonce: bytes, called_nonce: bytes) -> bytes:
        context = b"aiocomm proof\0" + role + bytes((0, _VERSION, self._mode, self._purpose))
        return hmac.digest(self._key, context + caller_nonce + called_nonce, hashlib.sha256)

    def _seal(self, role: bytes, caller_nonce: bytes, called_nonce: bytes) -> Seal:
        context = b"aiocomm session\0" + role + bytes((0, _VERSION, self._mode, self._purpose))
        return Seal(hmac.digest(self._key, context + caller_nonce + called_nonce, hashlib.sha256))


class Caller(_Side):
    """The side that made the connection."""

    def hello(self) -> bytes:
        """The first message."""
        return self._hello()

    def answer(self, hello: bytes) -> bytes:
        """The proof, given the called side's hello.

        Raises:
            AuthenticationError: the other end is something else or of another mode.
        """
        self._other = self._check_hello(hello)
        return self._proof(b"caller", self._nonce, self._other)

    def finish(self, verdict: bytes) -> None:
        """Check the called side's verdict and proof.

        Raises:
            AuthenticationError: the tokens differ.
        """
        if verdict[:1] != _OK:
            raise AuthenticationError(
                "the other end refused this group's token; AIOCOMM_TOKEN differs between the two"
            )
        expected = self._proof(b"called", self._nonce, self._other)
        if len(verdict) != VERDICT_SIZE or not hmac.compare_digest(verdict[1:], expected):
            raise AuthenticationError("the other end does not know this group's token")

    def seals(self) -> tuple[Seal, Seal]:
        """For what this side sends, and for what it receives; after `finish`."""
        nonces = (self._nonce, self._other)
        return self._seal(b"caller", *nonces), self._seal(b"called", *nonces)


class Called(_Side):
    """The side that accepted the connection."""

    def hello(self) -> bytes:
        """The answer to the caller's hello, also where that is refused, so that the caller learns why."""
        return self._hello()

    def challenge(self, hello: bytes) -> None:
        """Take the caller's hello.

        Raises:
            AuthenticationError: the other end is something else or of another mode.
        """
        self._other = self._check_hello(hello)

    def verdict(self, proof: bytes) -> tuple[bool, bytes]:
        """Whether the caller's proof holds, and what to tell it."""
        expected = self._proof(b"caller", self._other, self._nonce)
        if not hmac.compare_digest(proof, expected):
            return False, _REFUSED + bytes(PROOF_SIZE)
        return True, _OK + self._proof(b"called", self._other, self._nonce)

    def seals(self) -> tuple[Seal, Seal]:
        """For what this side sends, and for what it receives; after a good `verdict`."""
        nonces = (self._other, self._nonce)
        return self._seal(b"called", *nonces), self._seal(b"caller", *nonces)

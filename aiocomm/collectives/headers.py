"""What ranks tell each other of a collective call, so that a call that differs is found by all of them.

Every rank sends every other a header: the text of its call, such as `all_reduce sum float32 (1024,) ring`.
All ranks see the same headers, judge them by the same rule, and so raise the same error. Headers travel
beside the data, and small data inside them, so they cost no round trip of their own where every rank waits
for every other anyway. An operation that has a root therefore ends at a rank only when all have called it.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections import Counter
from typing import TYPE_CHECKING, Final

from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ABORT_BYTES",
    "DIRECT_MEMBERS",
    "HEADER_BYTES",
    "REFUSED",
    "Why",
    "abort_message",
    "header",
    "judge",
    "parse_abort",
    "refusal",
    "unpaired",
]

DIRECT_MEMBERS: Final = 16  # in larger groups headers go by dissemination
HEADER_BYTES: Final = 160
_DIGEST_BYTES: Final = 12
_CUT: Final = HEADER_BYTES - 2 * _DIGEST_BYTES - 1  # a text that is longer: a # is there, and a digest
REFUSED: Final = "!"  # begins the text of a call that its own rank refused

_REASON_BYTES: Final = 240
_ABORT: Final = struct.Struct(f"<QBi{_REASON_BYTES}s")
ABORT_BYTES: Final = _ABORT.size


class Why(enum.IntEnum):
    """Why a call failed at another rank, or what else is said of it."""

    OTHER = 0
    LOST = 1
    DEADLINE = 2
    ASKS = 3  # no failure: the sender, who is about to leave, asks whether the call has ended
    ENDED = 4  # and is told so
    CLOSED = 5  # nor will the sender make any later call that a rank waits in beside this one


def header(text: str) -> bytes:
    """The text in a fixed number of bytes; a long one is cut, and ends with a digest of all of it."""
    encoded = text.encode(errors="backslashreplace")
    if len(encoded) > HEADER_BYTES:
        digest = hashlib.blake2b(encoded, digest_size=_DIGEST_BYTES).hexdigest().encode()
        encoded = encoded[:_CUT] + b"#" + digest
    return encoded.ljust(HEADER_BYTES, b"\0")


def refusal(error: Exception) -> bytes:
    """The header of a call that its own rank refused."""
    what = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
    return header(f"{REFUSED}{what}")


def _text(one: bytes) -> str:
    text = one.rstrip(b"\0")
    if len(text) == HEADER_BYTES and text[_CUT:].startswith(b"#"):
        return text[:_CUT].decode(errors="ignore") + "…"
    return text.decode(errors="replace")


def judge(headers: Sequence[bytes], names: Sequence[str]) -> str | None:
    """What is wrong with a call, or None. The same on all ranks, which hold the same headers.

    Most ranks are right; where no majority is, those that agree with the lowest rank.

    Args:
        headers: by rank of the group.
        names: of the ranks, for the message.
    """
    first = headers[0]
    if all(one == first for one in headers) and not first.startswith(REFUSED.encode()):
        return None
    refusals: dict[str, list[str]] = {}
    for name, h in zip(names, headers, strict=True):
        if h[:1] == b"!":
            refusals.setdefault(_text(h)[1:], []).append(name)
    if refusals:
        return "; ".join(_refused(some, len(names), text) for text, some in refusals.items())
    counts = Counter(headers)
    right = max(counts, key=lambda one: (counts[one], -headers.index(one)))
    wrong = [f"{name} called {_text(h)}" for name, h in zip(names, headers, strict=True) if h != right]
    return f"{', '.join(wrong)}, and the others {_text(right)}: all ranks must call alike, in one order"


def _refused(some: Sequence[str], size: int, text: str) -> str:
    """Who has refused its call for this reason: most programs are wrong on all ranks alike."""
    if len(some) == 1:
        return f"{some[0]} refused its call: {text}"
    who = "all ranks" if len(some) == size else f"{', '.join(some[:-1])} and {some[-1]}"
    return f"{who} refused their calls: {text}"


def unpaired(vectors: Sequence[Sequence[int]], names: Sequence[str]) -> str | None:
    """Find counts that do not fit together.

    Args:
        vectors: by rank, what it gives to each rank and then what it expects of each, in elements.
    """
    size = len(vectors)
    for giver in range(size):
        for taker in range(size):
            given, wanted = vectors[giver][taker], vectors[taker][size + giver]
            if given != wanted:
                return f"{names[giver]} gives {names[taker]} {given} elements, which expects {wanted}"
    return None


def abort_message(number: int, why: Why, lost: int, text: str) -> bytes:
    """Tell the others that call `number` has failed here. `lost`: the world rank that is gone, or -1."""
    return _ABORT.pack(number, why, lost, text.encode(errors="backslashreplace")[:_REASON_BYTES])


def parse_abort(message: bytes | bytearray) -> tuple[int, Why, int, str] | None:
    """The number of the call, why it failed, the lost world rank or -1, and the reason.

    None: it is no word that this release knows.
    """
    if len(message) != ABORT_BYTES:
        return None
    number, why, lost, text = _ABORT.unpack(message)
    if why not in Why.__members__.values():
        return None
    return number, Why(why), lost, text.rstrip(b"\0").decode(errors="replace")

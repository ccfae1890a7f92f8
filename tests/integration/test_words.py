"""Words of a group's members that are lost on their way, or are none: those that come later are heard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import all_call, until

import aiocomm
from aiocomm.collectives import headers

if TYPE_CHECKING:
    from conftest import Pair

pytestmark = pytest.mark.anyio

LONG = bytes(2 * headers.ABORT_BYTES)  # its receive fails, as one does whose sender dies or gives up
SHORT = b"short"
UNKNOWN = bytearray(headers.abort_message(1, headers.Why.OTHER, -1, "of a release to come"))
UNKNOWN[8] = 77


@pytest.mark.parametrize("word", [LONG, SHORT, bytes(UNKNOWN)], ids=["lost", "short", "unknown"])
async def test_later_words_are_heard(pair: Pair, word: bytes) -> None:
    groups: dict[int, aiocomm.Group] = {}

    async def join(comm: aiocomm.Communicator) -> None:
        groups[comm.rank] = await comm.group([0, 1])

    await all_call(list(pair), join)
    scope = groups[1]._scope(None)
    for _ in range(2):
        told = scope._send(word, 0)
        await pair[1].send(b"", 0)
        await pair[0].recv(bytearray(1), 1)
        await until(told.done)  # its end comes by another channel than the message
    groups[1].close()
    with pytest.raises(aiocomm.TransferCancelled, match="rank 1 gave the call up"):
        await groups[0].barrier()

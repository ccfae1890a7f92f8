"""What workers of two engines say to each other, and how they find each other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm.errors import AiocommError, PeerLostError, TruncationError
from aiocomm.region import look_away
from aiocomm.types import ANY_SOURCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from aiocomm.communicator import Communicator
    from aiocomm.vllm.steps import Origin
    from aiocomm_native import Transfer

__all__ = ["Words", "name_of"]

_SAID = 0  # the tag of what readers say; answers come by tags that these name
_LONGEST = 65536
_log = logging.getLogger("aiocomm.vllm")


def name_of(engine: str, stage: int, rank: int) -> str:
    """The name of a worker among the peers."""
    return f"vllm/{engine}/{stage}/{rank}"


class Words:
    """Small messages over a channel of their own.

    It is as urgent as that of the blocks: what is sent rarely has its turn soon, and where cores are few an
    urgent channel costs the others one of the threads that copy.

    Args:
        comm: a communicator of the world of all engines.
        stage: this worker's pipeline stage; it speaks with the same stage of other engines.
        within_s: seconds that somebody is waited for.
    """

    def __init__(self, comm: Communicator, stage: int, within_s: float) -> None:
        self._comm = comm
        self._stage = stage
        self._within_s = within_s
        self._channel = comm.channel("vllm")
        self._tags = itertools.count(_SAID + 1)
        self._changed = asyncio.Event()

    async def heard(self) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """What the others say, and their ranks in the world."""
        buffer = bytearray(_LONGEST)
        while True:
            changed = self._changed
            try:
                status = await self._channel.recv(buffer, src=ANY_SOURCE, tag=_SAID)
                said = json.loads(buffer[: status.nbytes])
            except (ValueError, RecursionError, TruncationError) as error:
                _log.warning("what a member of the world said is not understood: %r", error)
                continue
            except PeerLostError:  # who was about to say something; or all, and the rendezvous is gone, too
                if not any(peer.alive for peer in self._comm.peers):
                    await changed.wait()
                continue
            yield status.source, said

    async def ask(self, rank: int, word: dict[str, Any]) -> bytes:
        """Say something to a rank of the world, and wait for its answer.

        It answers always, so the answer is taken also when this was given up: unread, it would stay for ever.
        """
        tag = next(self._tags)
        answering = self._channel.recv_array(rank, tag=tag)
        answering.add_done_callback(look_away)
        asking = self._send(rank, {**word, "reply": tag, "within_s": self._within_s})
        asking.add_done_callback(lambda _: _succeeded(asking) or answering.cancel())
        await asyncio.shield(asking)  # given up here, it may be there all the same
        return bytes((await asyncio.shield(answering)).tobytes())

    async def answer(self, rank: int, asked: dict[str, Any], answer: bytes) -> None:
        """Answer what a rank of the world has asked."""
        await self._channel.send(np.frombuffer(answer, np.uint8), rank, tag=asked["reply"])

    async def tell(self, origin: Origin, ranks: Iterable[int], word: dict[str, Any]) -> None:
        """Say something of a request to workers of the engine that has it. Who is gone need not be told."""
        for rank in ranks:
            with contextlib.suppress(AiocommError, TimeoutError):
                async with asyncio.timeout(self._within_s):
                    await self._send(await self.find(origin, rank), {**word, "request": origin.request})

    async def find(self, origin: Origin, rank: int) -> int:
        """The rank in the world of a worker. Waits for one that has not come yet.

        Raises:
            PeerLostError: it was here, and is gone.
        """
        name = name_of(origin.engine, self._stage, rank)
        while True:
            changed = self._changed
            known = [peer for peer in self._comm.peers if peer.name == name]
            for peer in reversed(known):  # of one that was cut off and is back another may seem to live yet
                if peer.alive:
                    return peer.rank
            if known:
                raise PeerLostError(f"worker {rank} of engine {origin.engine} is gone")
            await changed.wait()

    def is_there(self, rank: int) -> bool:
        """Whether a rank of the world lives."""
        return any(peer.alive for peer in self._comm.peers if peer.rank == rank)

    async def follow(self) -> None:
        """Wake up who waits for somebody, whenever that might have come."""
        async for _ in self._comm.events():
            self._changed.set()
            self._changed = asyncio.Event()

    def _send(self, rank: int, word: dict[str, Any]) -> Transfer[None]:
        return self._channel.send(np.frombuffer(json.dumps(word).encode(), np.uint8), rank, tag=_SAID)


def _succeeded(transfer: Transfer[Any]) -> bool:
    return not transfer.cancelled() and transfer.exception() is None

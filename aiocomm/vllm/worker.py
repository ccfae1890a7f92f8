"""A worker's thread: the loop on which its exchange runs, and how vLLM's own thread reaches it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from aiocomm._control.loopthread import LoopThread
from aiocomm.connecting import Connecting, connect
from aiocomm.errors import DeadlineExceeded, UsageError
from aiocomm.types import LinkDown
from aiocomm.vllm.exchange import Exchange
from aiocomm.vllm.steps import Outcome, Step
from aiocomm.vllm.words import name_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiocomm.communicator import Communicator
    from aiocomm.vllm.caches import Caches, Geometry
    from aiocomm.vllm.ranks import Place
    from aiocomm.vllm.steps import Figures

__all__ = ["Options", "Worker"]

_log = logging.getLogger("aiocomm.vllm")


@dataclass(frozen=True, slots=True)
class Options:
    """What a user says in `kv_connector_extra_config`.

    Args:
        address: of the rendezvous that all engines join: `aiocomm rendezvous --listen tcp://0.0.0.0:7000`.
        token: the engines' secret; better in `AIOCOMM_TOKEN_FILE`.
        links: that may be used; default: all that work.
        lease_s: seconds for which a prefill engine keeps blocks that nobody has claimed.
        fetch_s: seconds that a decode engine gives a transfer.
        join_s: seconds that joining may take; default AIOCOMM_TIMEOUT_S.
    """

    address: str
    token: str | None = None
    links: str | list[str] | None = None
    lease_s: float = 30.0
    fetch_s: float = 30.0
    join_s: float | None = None

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Options:
        """Read them.

        Raises:
            UsageError: one is unknown, is missing or makes no sense.
        """
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(extra) - set(names)):
            raise UsageError(f"kv_connector_extra_config: {unknown} unknown; there are {names}")
        if not isinstance(extra.get("address"), str):
            raise UsageError(
                "kv_connector_extra_config needs the address where the engines meet, such as "
                '{"address": "tcp://10.0.0.1:7000"}; there listens `aiocomm rendezvous --listen tcp://0.0.0.0:7000`'
            )
        for name in ("lease_s", "fetch_s"):
            value = extra.get(name, 1.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UsageError(f"kv_connector_extra_config: {name}={value!r}: seconds, more than 0")
        return cls(**extra)


class Worker:
    """One worker of an engine. vLLM's thread calls its methods; only `join` and `close` wait."""

    def __init__(self, options: Options, place: Place) -> None:
        self._options = options
        self._place = place
        self._thread = LoopThread("aiocomm-vllm")
        self._exchange: Exchange | None = None
        self._running: concurrent.futures.Future[None] | None = None
        self._outcome = Outcome()

    def join(self, caches: Caches, geometry: Geometry) -> None:
        """Join the world of all engines, and serve these caches.

        Raises:
            UsageError: another engine there has the same name.
            AiocommError: it cannot be joined.
        """
        joined: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._running = self._thread.submit(self._run(caches, geometry, joined))
        joined.result()

    async def _run(self, caches: Caches, geometry: Geometry, joined: concurrent.futures.Future[None]) -> None:
        try:
            async with contextlib.AsyncExitStack() as worlds:
                comm = await worlds.enter_async_context(self._connect())
                self._check_name(comm)
                exchange = self._exchange = self._exchange_in(comm, caches, geometry)
                joined.set_result(None)
                while (again := await self._serve(comm, exchange)) is not None:
                    await worlds.enter_async_context(again)
                    await comm.aclose()  # from here on nobody reads what it has lent
                    rest, comm = exchange.rest(), again
                    exchange = self._exchange = self._exchange_in(comm, caches, geometry)
                    exchange.begin(rest)
        except BaseException as error:
            if joined.done():
                raise
            joined.set_exception(error)  # or `join` would wait for ever
        finally:
            if self._exchange is not None:
                self._exchange.give_back()  # nobody reaches the caches any more

    def _exchange_in(self, comm: Communicator, caches: Caches, geometry: Geometry) -> Exchange:
        options = self._options
        return Exchange(comm, self._place, caches, geometry, self._outcome, options.lease_s, options.fetch_s)

    def _connect(self) -> Connecting:
        options, place = self._options, self._place
        return connect(
            options.address,
            name=name_of(place.engine, place.stage, place.rank),
            token=options.token,
            links=options.links,
            deadline=options.join_s,
        )

    async def _serve(self, comm: Communicator, exchange: Exchange) -> Communicator | None:
        """Hand over until the world was joined anew, whose rendezvous was lost; None: it cannot any more."""
        loop = asyncio.get_running_loop()
        serving, joining = loop.create_task(exchange.run()), loop.create_task(self._join_anew(comm))
        try:
            await asyncio.wait((serving, joining), return_when=asyncio.FIRST_COMPLETED)
            return joining.result() if joining.done() else serving.result()
        except Exception as error:  # the engine goes on by itself
            _log.error("KV blocks are not handed over any more: %r", error, exc_info=error)
            return None
        finally:
            serving.cancel()
            joining.cancel()
            await asyncio.gather(serving, joining, return_exceptions=True)

    async def _join_anew(self, comm: Communicator) -> Communicator:
        """Once the rendezvous is lost. Who is there is reached without it, but nobody who comes later."""
        async for event in comm.events():
            if isinstance(event, LinkDown) and event.link == "rendezvous":
                break
        while True:
            try:
                return await self._connect()
            except DeadlineExceeded as error:
                _log.warning("other engines are not found any more: %s", error)

    def _check_name(self, comm: Communicator) -> None:
        name = name_of(self._place.engine, self._place.stage, self._place.rank)
        for peer in comm.peers:
            if peer.name == name and peer.alive and peer.rank < comm.rank:
                raise UsageError(
                    f"an engine of engine_id {self._place.engine!r} is there already (process {peer.pid} on "
                    f"{peer.host}): leave engine_id out of --kv-transfer-config, or give each its own"
                )

    def begin(self, step: Step) -> None:
        """Begin what a step asks for."""
        if step and self._exchange is not None:
            self._thread.call(self._begin, step)

    def _begin(self, step: Step) -> None:
        assert self._exchange is not None
        self._exchange.begin(step)

    def ended(self) -> tuple[set[str], set[str], set[str]]:
        """Requests that were sent, received, and of these failed, since the last call."""
        return self._outcome.taken()

    def figures(self) -> Figures:
        """What was done since the last call."""
        return self._outcome.figures()

    def close(self) -> None:
        """Leave the world. What is under way is broken off."""
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(concurrent.futures.CancelledError, asyncio.CancelledError):
                self._running.result()
        self._thread.stop()
        self._thread.join()

"""UCXX, as its documentation sets it up and at its best.

At its best means endpoints made from the worker's address instead of a listener, no endpoint error handling
(with it, UCX does not use shared memory and falls back to TCP), and progress mode "blocking", which polls
from the event loop without ever sleeping. A dead peer is not reported then.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from .base import Array, Loop, Peer, Transport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..control import Control


class _Ucxx(Transport):
    def __init__(self, endpoint: Any, **tag: Any) -> None:
        self._endpoint, self._tag = endpoint, tag

    async def send(self, data: Array) -> None:
        await self._endpoint.send(data, **self._tag)

    async def recv(self, out: Array) -> None:
        await self._endpoint.recv(out, **self._tag)

    async def send_many(self, messages: Sequence[Array]) -> None:
        await asyncio.gather(*[self._endpoint.send(m, **self._tag) for m in messages])

    async def recv_many(self, outs: Sequence[Array]) -> None:
        await asyncio.gather(*[self._endpoint.recv(o, **self._tag) for o in outs])


async def _open_documented(role: int, control: Control) -> Transport:
    import ucxx

    ucxx.init()
    if role == 1:
        return _Ucxx(await ucxx.create_endpoint("127.0.0.1", control.recv()))
    accepted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def accept(endpoint: Any) -> None:
        accepted.set_result(endpoint)
        await asyncio.Event().wait()  # the endpoint is closed when this returns

    listener = ucxx.create_listener(accept)
    control.send(listener.port)
    transport = _Ucxx(await accepted)
    transport.listener = listener  # type: ignore[attr-defined]  # closes when forgotten
    return transport


async def _open_best(role: int, control: Control) -> Transport:
    import ucxx
    from ucxx._lib.libucxx import UCXAddress
    from ucxx.types import Tag

    ucxx.init()
    address = control.swap(bytes(memoryview(ucxx.get_worker_address())))
    endpoint = await ucxx.create_endpoint_from_worker_address(
        UCXAddress.create_from_buffer(address), endpoint_error_handling=False
    )
    return _Ucxx(endpoint, tag=Tag(7), force_tag=True)


def _peer(name: str, opening: Any, mode: str, loop: Loop, wire: Any, note: str) -> Peer:
    return Peer(
        name, opening, "peer", wire, loop, ("ucxx",), "pip install ucxx-cu12", note=note,
        environment={"UCXPY_PROGRESS_MODE": mode, "UCX_LOG_LEVEL": "error", "UCX_WARN_UNUSED_ENV_VARS": "n"},
    )  # fmt: skip


_DOCUMENTED = "listener and error handling, as documented: UCX then uses TCP on one host"
_BEST = "worker address, no error handling, progress mode 'blocking'"
PEERS = [
    _peer("ucxx-documented", _open_documented, "thread", "asyncio", "tcp", _DOCUMENTED),
    _peer("ucxx-best", _open_best, "blocking", "asyncio", "memory", _BEST),
    _peer("ucxx-best-uvloop", _open_best, "blocking", "uvloop", "memory", _BEST),
]

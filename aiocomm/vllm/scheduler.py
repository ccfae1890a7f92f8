"""The scheduler's side: which requests come from another engine, and which another one comes for.

Requests carry `kv_transfer_params`, as vLLM's routers pass them from a prefill engine's answer to a decode
engine.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiocomm.vllm.steps import Fetch, Origin, Step, lent_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Scheduler"]

_log = logging.getLogger("aiocomm.vllm")


@dataclass(frozen=True, slots=True)
class _Source:
    """What a request's parameters say of where it was computed."""

    origin: Origin
    blocks: tuple[int, ...]
    tokens: int


class Scheduler:
    """One engine's bookkeeping. `step()` says what its workers are to do.

    Args:
        engine: this engine's id.
        ranks: of its tensor parallelism.
        block_size: tokens of a block.
        fetches: whether `kv_role` lets it go on with what others have computed. vLLM relies on it where it
            gives blocks to others while a step may yet write them.
        lends: whether `kv_role` lets others go on with what it has computed.
    """

    def __init__(
        self, engine: str, ranks: int, block_size: int, *, fetches: bool = True, lends: bool = True
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._block_size = block_size
        self._fetches = fetches
        self._lends = lends
        self._step = Step()
        self._sources: dict[str, _Source] = {}  # of requests that have no blocks here yet
        self._fetching: set[str] = set()

    def added(self, request: str, params: Mapping[str, Any] | None) -> None:
        """Tell the origin that somebody will come: it keeps the blocks, however long the queue is here."""
        if not params or not params.get("do_remote_prefill"):
            return
        if not self._fetches:
            _log.warning("request %s is computed here: by its kv_role this engine only prefills", request)
            return
        source = _source(params)
        if source is None:
            _log.warning(
                "request %s is computed here: its kv_transfer_params do not say whence: %s", request, params
            )
            return
        self._sources[request] = source
        self._step.claim.append(source.origin)

    def matched(self, request: str, prompt: int, computed: int) -> int:
        """Tokens that come from elsewhere, beyond those that are computed here."""
        source = self._sources.get(request)
        return 0 if source is None else max(0, min(prompt, source.tokens) - computed)

    def allocated(self, request: str, prompt: int, blocks: Sequence[int], coming: int) -> None:
        """Have the tokens that `matched` announced fetched into the request's blocks, or none released."""
        source = self._sources.pop(request, None)
        if source is None:
            return
        if coming <= 0:
            self._step.release.append(source.origin)
            return
        tokens = min(prompt, source.tokens)
        some = slice((tokens - coming) // self._block_size, -(-tokens // self._block_size))
        self._step.fetch.append(Fetch(request, source.origin, source.blocks[some], tuple(blocks[some])))
        self._fetching.add(request)

    def received(self, requests: set[str]) -> None:
        """Fetches that are over."""
        self._fetching -= requests

    def finished(
        self,
        request: str,
        params: Mapping[str, Any] | None,
        tokens: int,
        blocks: Sequence[int],
        complete: bool,
    ) -> dict[str, Any] | None:
        """What another engine has to know of a request whose blocks are kept for it; None: they are not.

        Args:
            tokens: of which the blocks hold keys and values.
            complete: it was not broken off.
        """
        if (source := self._sources.pop(request, None)) is not None:
            self._step.release.append(source.origin)
        if request in self._fetching:
            self._step.cancel.append(request)
        if not params or not params.get("do_remote_decode") or not complete or not blocks:
            return None
        if not self._lends:
            _log.warning("request %s is not handed over: by its kv_role this engine only decodes", request)
            return None
        name = lent_name(request)
        self._step.keep[name] = tuple(blocks)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self._engine,
            "remote_request_id": name,
            "remote_block_ids": list(blocks),
            "remote_num_tokens": tokens,
            "tp_size": self._ranks,
        }

    def step(self) -> Step:
        """What is to be begun now; told once."""
        step, self._step = self._step, Step()
        return step


def _source(params: Mapping[str, Any]) -> _Source | None:
    engine, request = params.get("remote_engine_id"), params.get("remote_request_id")
    blocks, tokens, ranks = (
        params.get("remote_block_ids"),
        params.get("remote_num_tokens"),
        params.get("tp_size"),
    )
    if not isinstance(engine, str) or not isinstance(request, str) or not isinstance(blocks, list):
        return None
    if not isinstance(tokens, int) or not isinstance(ranks, int) or ranks < 1:
        return None
    if not all(isinstance(block, int) and block >= 0 for block in blocks):
        return None
    return _Source(Origin(engine, ranks, request), tuple(blocks), tokens)

"""What is logged: through structlog onto the logger `aiocomm`, which applications configure."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import structlog

from aiocomm.types import Fallback, LinkDown, PeerLost, Undelivered

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiocomm.errors import AiocommError
    from aiocomm.types import Event

__all__ = ["EventLog"]

_LOGGER = logging.getLogger("aiocomm")
_told: set[str] = set()  # variables of this process's environment


class EventLog:
    """Logs what somebody may have to act on: events, each fallback once, and failures that nobody awaited.

    Args:
        level: least severe level that is logged, while the application has set none for the logger `aiocomm`.
    """

    def __init__(self, level: str) -> None:
        if _LOGGER.level == logging.NOTSET:
            _LOGGER.setLevel(level)
        self._log: Any = structlog.wrap_logger(
            _LOGGER,
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.stdlib.add_log_level,
                structlog.processors.format_exc_info,
                structlog.processors.KeyValueRenderer(key_order=["event"]),
            ],
            wrapper_class=structlog.stdlib.BoundLogger,
        )
        self._fallbacks: set[tuple[str, str, str]] = set()
        self._ended: set[int] = set()

    def ends(self, rank: int) -> None:
        """This process ends another one itself: that it is lost then is no news."""
        self._ended.add(rank)

    def __call__(self, rank: int, event: Event) -> None:
        """Log an event as seen by `rank`."""
        match event:
            case PeerLost(peer, _, "left"):
                self._log.info("peer left", rank=rank, peer=peer)
            case PeerLost(peer, _, reason):
                tell = self._log.info if peer in self._ended else self._log.warning
                tell("peer lost", rank=rank, peer=peer, reason=reason)
            case LinkDown(link, peer, reason):
                self._log.warning("link down", rank=rank, peer=peer, link=link, reason=reason)
            case Undelivered(peer, channel, tag, reason):
                self._log.warning(
                    "message undelivered", rank=rank, peer=peer, channel=channel, tag=tag, reason=reason
                )
            case Fallback(link, peer, path, reason):
                key = (link, path, reason)
                if key not in self._fallbacks:
                    self._fallbacks.add(key)
                    self._log.warning(
                        "slower path in use", rank=rank, peer=peer, link=link, path=path, reason=reason
                    )
            case _:
                self._log.debug(type(event).__name__, rank=rank)

    def unknown(self, variables: Iterable[tuple[str, str | None]]) -> None:
        """Log, once each, variables that mean nothing: a warning if another one is likely to be meant."""
        for name, meant in variables:
            if name not in _told:
                _told.add(name)
                tell = self._log.warning if meant else self._log.info
                tell("unknown variable, which has no effect", name=name, meant=meant or "?")

    def unawaited(self, rank: int, error: AiocommError) -> None:
        """Log the first failure of a transfer that nobody awaited: all are told only at the end."""
        self._log.warning("transfer failed, and nobody awaited it", rank=rank, error=str(error))

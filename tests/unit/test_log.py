"""What the runtime logs: what somebody may have to act on, a fallback once."""

from __future__ import annotations

import asyncio
import logging
import sys

import pytest
from harness import until

import aiocomm
from aiocomm._log import EventLog
from aiocomm._loop.backend import current_backend
from aiocomm.types import Fallback, LinkDown, LinkUp, PeerLost, Undelivered


def test_losses_are_warnings_and_goodbyes_are_not(caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog("WARNING")
    with caplog.at_level(logging.INFO, "aiocomm"):
        log(0, PeerLost(1, 7, "its process ended"))
        log(0, PeerLost(2, 7, "left"))
        log(0, Undelivered(3, "kv", 5, "truncated"))
        log(0, LinkUp("shm", 1))
    levels = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in levels] == ["WARNING", "INFO", "WARNING"]
    assert "peer=1" in levels[0][1]
    assert "its process ended" in levels[0][1]
    assert "channel='kv'" in levels[2][1]


def test_a_fallback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog("WARNING")
    with caplog.at_level(logging.WARNING, "aiocomm"):
        for rank in (1, 2, 3):
            log(0, Fallback("shm", rank, "stream", "cross-memory attach is refused"))
        log(0, Fallback("shm", 1, "stream", "another reason"))
    assert len(caplog.records) == 2


@pytest.mark.parametrize(("own", "expected"), [(logging.NOTSET, logging.ERROR), (logging.INFO, logging.INFO)])
def test_the_applications_level_wins(own: int, expected: int) -> None:
    logger = logging.getLogger("aiocomm")
    before = logger.level
    try:
        logger.setLevel(own)
        EventLog("ERROR")
        assert logger.level == expected
    finally:
        logger.setLevel(before)


class _Raising(logging.Handler):
    """An application's, which is broken."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ZeroDivisionError(record.getMessage())


@pytest.mark.anyio
async def test_a_handler_that_raises_costs_no_event_and_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(kind))
    if (backend := current_backend()).name == "asyncio":
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: told.append(type(context["exception"]))
        )
    handler = _Raising()
    logging.getLogger("aiocomm").addHandler(handler)
    try:
        async with aiocomm.connect() as comm:
            events = comm.events()
            for reason in ("it died", "again"):
                comm._on_control_event(LinkDown("rendezvous", -1, reason))
                event = await anext(events)
                assert isinstance(event, LinkDown)
                assert event.reason == reason
            await until(lambda: len(told) == 2)
    finally:
        logging.getLogger("aiocomm").removeHandler(handler)
    assert told == [ZeroDivisionError] * 2, backend.name

"""What the runtime logs: what somebody may have to act on, a fallback once."""

from __future__ import annotations

import logging

import pytest

from aiocomm._log import EventLog
from aiocomm.types import Fallback, LinkUp, PeerLost, Undelivered


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

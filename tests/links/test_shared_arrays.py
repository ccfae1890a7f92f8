"""Arrays of `aiocomm.empty()`: peers map them, and let them go when their owner does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from harness import until, world

import aiocomm

if TYPE_CHECKING:
    from conftest import Pair
    from links.conftest import Variant

pytestmark = pytest.mark.anyio


def mapped() -> int:
    """Mappings of shared arrays in this process, by owners and by peers."""
    return Path("/proc/self/maps").read_text().count("memfd:aiocomm-array")


async def test_a_freed_array_is_unmapped_everywhere(pair: Pair, variant: Variant) -> None:
    a, b = pair
    got = np.zeros(1 << 20, np.uint8)
    before = mapped()
    for number in range(50):
        array = aiocomm.empty(1 << 20, np.uint8)
        array.fill(number)
        sending = a.send(array, 1)
        await b.recv(got, 0)
        await sending
        assert (got == number).all()
        del array, sending
        assert mapped() <= before + 4
    await a.send(b"x", 1, tag=1)
    await b.recv(bytearray(1), 0, tag=1)
    await until(lambda: mapped() <= before)


async def test_an_array_is_mapped_once(pair: Pair, variant: Variant) -> None:
    a, b = pair
    array, got = aiocomm.empty(4 << 20, np.uint8), np.zeros(1 << 20, np.uint8)
    array[:] = np.arange(4 << 20) % 251
    before = mapped()
    for start in range(0, 3 << 20, 1 << 18):
        sending = a.send(array[start : start + (1 << 20)], 1)
        await b.recv(got, 0)
        await sending
        np.testing.assert_array_equal(got, array[start : start + (1 << 20)])
    assert mapped() <= before + 1


@pytest.mark.parametrize("cma", ["auto", "off"])
async def test_a_fallback_is_counted_and_told(
    variant: Variant, cma: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where cross-memory attach is not to be had, and only there."""
    monkeypatch.setenv("AIOCOMM_CMA", cma)
    async with world(2, links=("shm",)) as (a, b):
        events = a.events()
        sending = a.send(np.ones(1 << 20, np.uint8), 1)
        await b.recv(np.zeros(1 << 20, np.uint8), 0)
        await sending
        assert a.links["shm"].statistics().fallbacks == (cma == "off")
        if cma == "off":
            async for event in events:
                if isinstance(event, aiocomm.Fallback):
                    assert (event.link, event.rank, event.path) == ("shm", 1, "stream")
                    assert event.reason == "cross-memory attach is switched off"
                    break
            await until(lambda: len([r for r in caplog.records if "slower path" in r.getMessage()]) == 2)

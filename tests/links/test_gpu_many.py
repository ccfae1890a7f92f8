"""More copies than a device takes at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from fakes.gpu import DeviceArray
from fakes.simulated import Engine
from harness import until, world
from links.test_gpu import other_device, random

if TYPE_CHECKING:
    from fakes.simulated import Simulator

    from aiocomm import Communicator

pytestmark = pytest.mark.anyio


class _Part:
    """Some bytes of an array."""

    def __init__(self, whole: DeviceArray, at: int) -> None:
        data = {"shape": (_NBYTES,), "typestr": "|u1", "data": (whole.address + at, False), "strides": None}
        self.__cuda_array_interface__ = {**data, "version": 3, "stream": None}


_MANY = 1200  # streams take some hundreds, and the queue before them a few hundred more
_NBYTES = 64


async def test_what_finds_no_room_follows_on_every_lane(simulator: Simulator) -> None:
    async with world(2, links=("shm", "cuda"), warmup=True) as (a, b):
        await _every_lane(simulator, a, b)


async def _every_lane(simulator: Simulator, a: Communicator, b: Communicator) -> None:
    data = random(_MANY * _NBYTES)
    source = DeviceArray(_MANY * _NBYTES).write(data)
    into = DeviceArray(_MANY * _NBYTES, device=other_device())
    on_host = np.zeros(_NBYTES, np.uint8)
    # Once before, so that both sides' memory is mapped.
    sent = a.send(source, 1)
    await b.recv(into, 0)
    await sent
    into.write(np.zeros(_MANY * _NBYTES, np.uint8))
    for device in {0, other_device()}:
        simulator.pause(device, Engine.PEER)
    places = range(0, _MANY * _NBYTES, _NBYTES)
    receives = [b.recv(_Part(into, at), 0, tag=1) for at in places]
    sends = [a.send(_Part(source, at), 1, tag=1) for at in places]
    last = [b.recv(on_host, 0, tag=2), a.send(_Part(source, 0), 1, tag=2)]
    await until(lambda: simulator.calls("cuMemcpyAsync") > 100)
    assert not sends[0].done()
    for device in {0, other_device()}:
        simulator.resume(device, Engine.PEER)
    for transfer in (*receives, *sends, *last):
        await transfer
    assert (into.numpy() == data).all()
    assert (on_host == data[:_NBYTES]).all()

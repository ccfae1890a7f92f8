"""What stands around the fragments of code in the documentation, so that they run.

A fragment is a block with `title="fragment"`. Those of a page are named here in their order: by a program in
which the line FRAGMENT stands for it, or by the reason why it does not run here.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Final

__all__ = ["AROUND", "NotRun", "program"]

_ALL_RANKS: Final = """
import asyncio
import aiocomm
import numpy as np

async def work(comm):
    group = await comm.group([0, 1, 2])
    if comm.rank == 2:
        return
{0}

async def main():
    async with aiocomm.spawn(work, n=2) as comm:
        await work(comm)

aiocomm.run(main())
"""


@dataclass(frozen=True)
class NotRun:
    """Why a fragment is read only."""

    why: str


AROUND: Final[dict[str, list[str | NotRun]]] = {
    "cancel": [
        """
import asyncio
import aiocomm
import numpy as np

async def worker(comm):
    await comm.send(await comm.recv_array(src=0, tag=17) * 2, dst=0, tag=17)

async def main():
    async with aiocomm.spawn(worker, n=1) as comm:
        request, prompt, answer = 17, np.ones(3), np.empty(3)
        FRAGMENT
        print(answer)
        assert (answer == 2).all() and not token.cancelled()

aiocomm.run(main())
"""
    ],
    "collectives": [
        _ALL_RANKS.format("""
    x = np.ones(4)
    FRAGMENT
    await group.all_reduce(y := np.ones(4))
    assert (y == 2).all() and group.size == 2
""")
    ],
    "experts": [
        NotRun("of torch on GPUs"),
        _ALL_RANKS.format("""
    x, ids, weights = np.ones((6, 8), np.float32), np.arange(6)[:, None] * 50, np.ones((6, 1), np.float32)
    FRAGMENT
    out = await group.combine(came.inputs, came)
    assert (out == x).all()
"""),
    ],
    "gpu": [
        """
import aiocomm
import numpy as np

async def worker(comm):
    mine = np.zeros(64, np.uint8)
    async with comm.register(mine) as region:
        await comm.exchange(region, with_=0)
        async for note in comm.notifications():
            print(note.payload, mine[:9])
            assert note.payload == b"request 17" and mine.sum() == 8
            break

async def main():
    kv_cache, block = np.ones(64, np.uint8), np.ones(8, np.uint8)
    async with aiocomm.spawn(worker, n=1) as comm:
        FRAGMENT

aiocomm.run(main())
""",
        """
import asyncio
import aiocomm
import numpy as np

async def main():
    pages, layers, page_bytes = 8, 2, 2048
    async with aiocomm.connect() as comm:
        FRAGMENT
        print(pool.shape)

aiocomm.run(main())
""",
        """
import aiocomm
import numpy as np

async def worker(comm):
    async with await comm.lease_pages(aiocomm.Pages(aiocomm.empty((8, 2, 2048), np.uint8))) as lease:
        await comm.send(np.frombuffer(lease.handle, np.uint8), dst=0)
        await comm.recv(bytearray(1), src=0)

async def main():
    array = np.zeros((4, 2, 2048), np.uint8)
    array[2] = 2
    kv = aiocomm.Pages(array)
    evicted, free, wanted, slots = [2], [5], [5], [3]
    async with aiocomm.spawn(worker, n=1) as comm:
        store = comm.remote_pages((await comm.recv_array(src=1)).tobytes())
        FRAGMENT
        await comm.send(b"x", dst=1)
        print(array[:, 0, 0])
        assert (array[3] == 2).all()

aiocomm.run(main())
""",
    ],
    "launchers": [
        """
import aiocomm

async def main():
    token = "secret"
    FRAGMENT
    print(comm.rank)
    await comm.aclose()

aiocomm.run(main())
""",
        """
import aiocomm

async def main():
    token = "secret"
    host = await aiocomm.connect("tcp://10.0.0.1:7000", rank=0, token=token)
    FRAGMENT
    print(comm.rank)
    await comm.aclose()
    await host.aclose()

aiocomm.run(main())
""",
    ],
    "observe": [
        """
import aiocomm
import prometheus_client

prometheus_client.start_http_server = lambda port: None  # others may have the port

async def main():
    async with aiocomm.connect() as comm:
        FRAGMENT
        text = prometheus_client.generate_latest().decode()
        prometheus_client.REGISTRY.unregister(metrics)
        print(text)
        assert 'model="llama"' in text

aiocomm.run(main())
"""
    ],
    "vllm": [
        """
import asyncio

PREFILL, DECODE = "http://prefill", "http://decode"

async def post(engine, body):
    if engine == PREFILL:
        assert body["max_tokens"] == 1 and body["kv_transfer_params"]["do_remote_decode"]
        return {"kv_transfer_params": {"do_remote_prefill": True, "blocks": [3]}}
    assert body["max_tokens"] == 64 and body["kv_transfer_params"]["blocks"] == [3]
    return {"choices": []}

async def main():
    request = {"prompt": "Once", "max_tokens": 64}
    FRAGMENT
    print(answer)

asyncio.run(main())
"""
    ],
}


def program(around: str, fragment: str) -> str:
    """Put a fragment into its place, as far to the right as that is."""
    (place,) = (line for line in around.splitlines() if line.strip() == "FRAGMENT")
    return around.replace(place, textwrap.indent(fragment, place.removesuffix("FRAGMENT")))

"""What a process does for the first time takes no longer than later on, as far as that is ours."""

from __future__ import annotations

import anyio
import pytest

import aiocomm


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_nothing_is_imported_in_the_middle_of_a_call(backend: str) -> None:
    """Of the worker it is said: this process has imported most of it long ago."""

    async def calls(comm: aiocomm.Communicator) -> None:
        import contextlib
        import sys

        import numpy as np

        from aiocomm import DeadlineExceeded

        before = set(sys.modules)
        for _ in range(3):
            await comm.barrier()
            await comm.all_reduce(np.zeros(1000, np.float32))
            await comm.all_gather(np.zeros(200_000 * comm.size, np.uint8), np.zeros(200_000, np.uint8))
        for nbytes in (8, 1 << 20):
            receiving = comm.recv(bytearray(nbytes), 1 - comm.rank)
            await comm.send(bytes(nbytes), 1 - comm.rank)
            await receiving
        with contextlib.suppress(DeadlineExceeded):
            await comm.recv(bytearray(8), 1 - comm.rank, tag=9, deadline=1e-3)
        late = [name for name in set(sys.modules) - before if name.partition(".")[0] in ("aiocomm", "anyio")]
        assert not late, sorted(late)

    async def main() -> None:
        async with aiocomm.spawn(calls, 1) as comm:
            await calls(comm)

    anyio.run(main, backend=backend)

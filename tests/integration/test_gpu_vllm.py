"""Workers of two engines hand KV blocks over that lie on GPUs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest
from fakes.gpu import DeviceArray
from kv_engines import Engine, fetch, hand_over, whole

from aiocomm.vllm.steps import Origin

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Child
    from numpy.typing import NDArray

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]


class OnGpus(Engine):
    """Each worker's part of the cache on a GPU."""

    def placed(self, data: NDArray[np.uint16], rank: int) -> DeviceArray:
        return DeviceArray(data.shape, data.dtype, rank).write(data)

    def seen(self, rank: int) -> NDArray[np.uint16]:
        found: NDArray[np.uint16] = self.memory[rank].numpy()
        return found


@pytest.fixture
def anyio_backend() -> str:
    """The workers have loops of their own; this one only looks at them."""
    return "asyncio"


async def joined(engine: Engine) -> Engine:
    await anyio.to_thread.run_sync(engine.join)
    return engine


@pytest.mark.parametrize(("theirs", "ours"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("kinds", [(OnGpus, OnGpus), (OnGpus, Engine), (Engine, OnGpus)])
async def test_blocks_go_over(
    address: str, theirs: int, ours: int, kinds: tuple[type[Engine], type[Engine]]
) -> None:
    """Between GPUs, and where one engine has its cache in host memory."""
    prefill = await joined(kinds[0](address, "prefill", 1, ranks=theirs))
    decode = await joined(kinds[1](address, "decode", 2, ranks=ours))
    try:
        await hand_over(prefill, decode)
    finally:
        decode.close()
        prefill.close()


PREFILL = """
import sys
tests, address = sys.argv[1:]
sys.path[:0] = [tests, tests + "/integration"]
from test_gpu_vllm import OnGpus
engine = OnGpus(address, "prefill", 1)
engine.join()
engine.begin(keep={"p": (3, 1, 10)})
print("joined", flush=True)
sys.stdin.read()
"""


async def test_an_engine_in_another_process_that_is_killed(address: str, child: Callable[..., Child]) -> None:
    prefill = child(PREFILL, str(Path(__file__).parents[1]), address)
    assert await prefill.line() == "joined"
    decode = await joined(OnGpus(address, "decode", 2))
    try:
        decode.begin(fetch=fetch("d", Origin("prefill", 1, "p"), [3, 1, 10], [0, 7, 5]))
        assert await decode.has_received("d")
        model = whole(2)
        for there, here in ((3, 0), (1, 7), (10, 5)):
            model[:, 2 * here : 2 * here + 2] = whole(1)[:, 2 * there : 2 * there + 2]
        np.testing.assert_array_equal(decode.seen(0), model)
        decode.begin(fetch=fetch("e", Origin("prefill", 1, "never"), [3], [0]))  # it waits there
        prefill.process.send_signal(signal.SIGKILL)
        assert not await decode.has_received("e")
        np.testing.assert_array_equal(decode.seen(0), model)
    finally:
        decode.close()

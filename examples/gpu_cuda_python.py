"""cuda-python alone: memory and streams of the driver, without an array library."""

import asyncio
from typing import Any

import numpy as np

import aiocomm

try:
    from cuda.bindings import driver

    DEVICES = driver.cuDeviceGetCount()[1] if driver.cuInit(0)[0] == 0 else 0
except ImportError:
    DEVICES = -1
except RuntimeError:  # no driver
    DEVICES = 0

COUNT = 1 << 20


def call(result: tuple[Any, ...]) -> Any:
    """What a function of the driver returns beside its error."""
    error, *values = result
    if error:
        raise RuntimeError(f"the driver says {error.name}")
    return values[0] if values else None


def use(device: int) -> None:
    """Make a device's primary context current, as CUDA's runtime does."""
    call(driver.cuInit(0))
    call(driver.cuCtxSetCurrent(call(driver.cuDevicePrimaryCtxRetain(call(driver.cuDeviceGet(device))))))


def in_host_memory(address: int) -> Any:
    """A copy of what lies there."""
    out = np.empty(COUNT, np.float32)
    call(driver.cuMemcpyDtoH(out.ctypes.data, address, out.nbytes))
    return out


class Floats:
    """Device memory. The interface is all that aiocomm asks for."""

    def __init__(self) -> None:
        self.address = int(call(driver.cuMemAlloc(4 * COUNT)))
        where = {"data": (self.address, False), "shape": (COUNT,), "typestr": "<f4", "version": 3}
        self.__cuda_array_interface__ = where


async def worker(comm: aiocomm.Communicator) -> None:
    device = DEVICES - 1  # the second GPU, or the only one
    use(device)
    into = Floats()
    await comm.recv(into, src=0)  # device to device
    print(f"rank 1: the sum on GPU {device} is {in_host_memory(into.address).sum():.0f}")
    await comm.send(into, dst=0)


async def main() -> None:
    use(0)
    async with aiocomm.spawn(worker, n=1) as comm:
        x, stream = Floats(), call(driver.cuStreamCreate(1))  # one that does not wait for the default stream
        call(driver.cuMemsetD32Async(x.address, int(np.float32(1).view(np.uint32)), COUNT, stream))
        await comm.send(x, dst=1, stream=stream)  # what the stream still does is waited for on the GPU

        back = await comm.recv_array(src=1, device=0)  # in memory that aiocomm makes
        np.testing.assert_array_equal(in_host_memory(back.address), 1)
        print(f"rank 0: {back.nbytes >> 20} MiB came back to GPU {back.device}")


if __name__ == "__main__":
    if DEVICES < 1:
        absent = "cuda-python is not installed (pip install 'aiocomm[cuda13]')"
        print(f"skipped: {absent if DEVICES < 0 else 'cuda-python sees no GPU'}; this example needs a GPU")
    else:
        asyncio.run(main())

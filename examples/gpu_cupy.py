"""CuPy arrays on streams of their own, and messages between GPU and host memory."""

import asyncio

import numpy as np

import aiocomm

try:
    import cupy

    DEVICES = cupy.cuda.runtime.getDeviceCount()
except ImportError:
    DEVICES = -1
except cupy.cuda.runtime.CUDARuntimeError:
    DEVICES = 0


async def worker(comm: aiocomm.Communicator) -> None:
    cupy.cuda.Device(DEVICES - 1).use()  # the second GPU, or the only one
    out = cupy.empty(1 << 20, cupy.float32)
    await comm.recv(out, src=0)  # device to device
    print(f"rank 1: the sum on GPU {out.device.id} is {float(out.sum()):.0f}")
    await comm.send(out * 2, dst=0)  # what CuPy's current stream still computes is waited for on the GPU


async def main() -> None:
    cupy.cuda.Device(0).use()
    async with aiocomm.spawn(worker, n=1) as comm:
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            x = cupy.ones(1 << 20, cupy.float32)
            for _ in range(100):
                x = cupy.sqrt(x * 4) - 1
        # Out of the `with` block CuPy's current stream is another one: name the stream that computes x.
        await comm.send(x, dst=1, stream=stream)

        back = np.empty(1 << 20, np.float32)
        await comm.recv(back, src=1)  # device there, host memory here: staged in pinned memory, pipelined
        np.testing.assert_array_equal(back, 2)
        print(f"rank 0: {back.nbytes >> 20} MiB came back into host memory, all of them {back[0]:.0f}")


if __name__ == "__main__":
    if DEVICES < 1:
        absent = "CuPy is not installed (pip install 'aiocomm[cuda13]')"
        print(f"skipped: {absent if DEVICES < 0 else 'CuPy sees no GPU'}; this example needs a GPU")
    else:
        asyncio.run(main())

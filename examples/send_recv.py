"""Send an array to another process, and receive its answer straight into your own."""

import numpy as np

import aiocomm


async def worker(comm: aiocomm.Communicator) -> None:
    x = await comm.recv_array(src=0, tag=7)  # dtype and shape travel along
    await comm.send(x * 2, dst=0, tag=8)


async def main() -> None:
    async with aiocomm.spawn(worker, n=1) as comm:
        x = np.arange(1_000_000, dtype=np.float32).reshape(1000, 1000)
        out = np.empty_like(x)
        answer = comm.recv(out, src=1, tag=8)  # submitted now: the bytes will go where they belong
        await comm.send(x, dst=1, tag=7)
        status = await answer
        np.testing.assert_array_equal(out, x * 2)
        print(f"rank {status.source} answered with {status.nbytes:,} bytes, tag {status.tag}")


if __name__ == "__main__":
    aiocomm.run(main())

"""Stop waiting: a deadline, `asyncio.timeout`, `cancel()`. Afterwards the buffer is yours again."""

import asyncio

import numpy as np

import aiocomm


async def worker(comm: aiocomm.Communicator) -> None:
    x = np.empty(8)
    await comm.recv(x, src=0, tag=1)  # nothing was sent before rank 0 had given up four times
    await comm.send(x + 1, dst=0, tag=2)


async def main() -> None:
    async with aiocomm.spawn(worker, n=1) as comm:
        out = np.full(8, 42.0)

        try:  # 1. every operation takes a deadline, in seconds from now
            await comm.recv(out, src=1, tag=2, deadline=0.05)
        except aiocomm.DeadlineExceeded as error:  # a TimeoutError
            print(f"deadline: {error}")

        try:  # 2. the loop's own timeouts cancel the transfer too
            async with asyncio.timeout(0.05):
                await comm.recv(out, src=1, tag=2)
        except TimeoutError:
            print("asyncio.timeout: cancelled")

        transfer = comm.recv(out, src=1, tag=2)  # 3. by hand
        assert transfer.cancel()
        try:
            await transfer
        except asyncio.CancelledError:
            print("cancel(): cancelled")

        waiting = asyncio.ensure_future(
            comm.recv_array(src=1, tag=2)
        )  # 4. with the task or the gather around it
        together = asyncio.gather(waiting, comm.recv(out, src=1, tag=2), return_exceptions=True)
        asyncio.get_running_loop().call_later(0.05, together.cancel)
        try:
            await together
        except asyncio.CancelledError:
            print("gather: cancelled")

        assert (out == 42).all()  # nothing has touched it, and nothing will
        answer = comm.recv(out, src=1, tag=2)
        await comm.send(np.arange(8.0), dst=1, tag=1)
        await answer
        np.testing.assert_array_equal(out, np.arange(8.0) + 1)
        print("and the next message arrives as if nothing had happened")


if __name__ == "__main__":
    aiocomm.run(main())

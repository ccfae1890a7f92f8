"""An urgent message does not wait behind a bulk transfer: it goes on a channel of a higher class."""

import statistics
from time import perf_counter

import numpy as np

import aiocomm

BULK_NBYTES, PINGS = 256 << 20, 50


async def worker(comm: aiocomm.Communicator) -> None:
    bulk = comm.channel("bulk", priority=aiocomm.Priority.LOW)
    urgent = comm.channel("urgent", priority=aiocomm.Priority.URGENT)
    await comm.send(np.zeros(1), dst=0)  # ready
    into = aiocomm.empty(BULK_NBYTES, np.uint8)
    received = bulk.recv(into, src=0)
    message = np.empty(128)
    for _ in range(PINGS):
        await urgent.recv(message, src=0)
        await urgent.send(message, dst=0)
    await received
    assert (into == 7).all()


async def main() -> None:
    async with aiocomm.spawn(worker, n=1) as comm:
        bulk = comm.channel("bulk", priority=aiocomm.Priority.LOW)
        urgent = comm.channel("urgent", priority=aiocomm.Priority.URGENT)
        data = aiocomm.empty(BULK_NBYTES, np.uint8)
        data[:] = 7
        await comm.recv(np.empty(1), src=1)

        start = perf_counter()
        sending = bulk.send(data, dst=1)  # a quarter of a gigabyte is on its way from here on
        message, times, overtook = np.arange(128.0), [], 0
        for _ in range(PINGS):
            begin = perf_counter()
            await urgent.send(message, dst=1)
            await urgent.recv(message, src=1)
            times.append(perf_counter() - begin)
            overtook += not sending.done()
        await sending
        took = perf_counter() - start

        print(
            f"bulk: {BULK_NBYTES / took / 1e9:.1f} GB/s; {overtook} of {PINGS} pings came back before its end"
        )
        print(f"urgent round trip: median {statistics.median(times) * 1e6:.0f} µs")


if __name__ == "__main__":
    aiocomm.run(main())

"""Register memory, swap handles, then put and get without the other side taking part."""

import numpy as np

import aiocomm


async def worker(comm: aiocomm.Communicator) -> None:
    table = aiocomm.empty((4, 1024), np.float32)
    table[:] = -1
    async with comm.register(table) as region:
        await comm.exchange(region, with_=0)
        async for note in comm.notifications():  # each comes after the data it announces
            row = int(note.payload.removeprefix(b"row "))
            assert note.source == 0
            assert note.nbytes == table[row].nbytes
            assert (table[row] == row).all()
            table[row] *= 10
            await comm.send(np.array([row]), dst=0)
            if row == len(table) - 1:
                break
        await comm.recv(np.empty(1), src=0)  # keep the region until rank 0 has read it


async def main() -> None:
    async with aiocomm.spawn(worker, n=1) as comm:
        mine = aiocomm.empty((4, 1024), np.float32)
        async with comm.register(mine) as region:
            remote = await comm.exchange(region, with_=1)
            row_nbytes = mine[0].nbytes
            for row in range(4):
                mine[row] = row
                there = remote[row * row_nbytes : (row + 1) * row_nbytes]  # narrowed, in bytes
                await comm.put(mine[row], there, notify=b"row %d" % row)
                await comm.recv(np.empty(1, np.int64), src=1)
            back = np.empty((4, 1024), np.float32)
            await comm.get(remote, into=back)
            np.testing.assert_array_equal(back, mine * 10)
            await comm.send(np.zeros(1), dst=1)
            print(f"put 4 rows, got {back.nbytes:,} bytes back: {back[:, 0]}")


if __name__ == "__main__":
    aiocomm.run(main())

"""The same interface under trio, in processes that a launcher starts: a token goes round a ring.

python examples/trio_ring.py                        starts itself with `aiocomm run -n 3`
aiocomm run -n 3 examples/trio_ring.py              the same by hand; torchrun, srun and mpirun do too
"""

import sys

import numpy as np
import trio

import aiocomm

ROUNDS = 10


async def main() -> None:
    async with aiocomm.connect() as comm:  # rank, size and meeting point come from the launcher
        if comm.size == 1:
            print("no launcher here: starting three processes")
            command = [sys.executable, "-m", "aiocomm", "run", "-n", "3", __file__]
            raise SystemExit((await trio.run_process(command, check=False)).returncode)
        left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        token = np.zeros(1, np.int64)
        with trio.fail_after(30):  # cancels the transfer, as any trio scope does
            for lap in range(ROUNDS):
                if comm.rank == 0:
                    token += 1
                    await comm.send(token, dst=right, tag=lap)
                    await comm.recv(token, src=left, tag=lap)
                else:
                    await comm.recv(token, src=left, tag=lap)
                    token += 1
                    await comm.send(token, dst=right, tag=lap)
        if comm.rank == 0:
            assert token[0] == ROUNDS * comm.size
            print(f"{ROUNDS} laps round {comm.size} processes: {token[0]}")


if __name__ == "__main__":
    trio.run(main)

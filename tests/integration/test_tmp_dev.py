from __future__ import annotations
import numpy as np, pytest
from fakes.gpu import DeviceArray, Driver, driver
from harness import all_call, world
import aiocomm
pytestmark=[pytest.mark.anyio, pytest.mark.usefixtures("gpu","images")]
LINKS=("shm","cuda")
def on_gpu(rank, values, **how): return DeviceArray(values.shape, values.dtype, device=rank % driver().count, **how).write(values)
@pytest.mark.parametrize("size",[2,3,4])
@pytest.mark.parametrize("count",[3,100_000, 8_000_000])
async def test_it(gpu, size, count):
    async with world(size, links=LINKS, warmup=True) as comms:
        async def call(comm):
            r=comm.rank
            for t in range(4):
                x=on_gpu(r,np.full(count,r+1+t,np.int32)); out=on_gpu(r,np.zeros(count*size,np.int32))
                await comm.all_gather(out,x)
                assert np.array_equal(out.numpy(), np.repeat(np.arange(size)+1+t,count))
                await comm.broadcast(x, 1)
                assert np.array_equal(x.numpy(), np.full(count, 2+t))
                g=on_gpu(r,np.repeat(np.arange(size)*10+r,count).astype(np.int32))
                await comm.all_to_all(out,g)
                assert np.array_equal(out.numpy(), np.repeat(np.arange(size)+10*r,count))
                await comm.all_reduce(x)
                assert np.array_equal(x.numpy(), np.full(count, size*(2+t)))
                await comm.scatter(x, g if r==0 else None)
                await comm.gather(out if r==0 else None, x)
                if r==0: assert np.array_equal(out.numpy(), np.repeat(np.arange(size)*10,count))
        await all_call(comms, call)
        print(comms[0].statistics().collectives)

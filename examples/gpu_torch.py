"""GPU to GPU with torch: a send follows a kernel without synchronising, and an urgent message passes bulk."""

import asyncio
import time

import aiocomm

try:
    import torch

    DEVICES = torch.cuda.device_count()
except ImportError:
    DEVICES = -1

MIB = 1 << 20


async def worker(comm: aiocomm.Communicator) -> None:
    torch.cuda.set_device(1)
    urgent, bulk = comm.channel("urgent", priority=aiocomm.Priority.HIGH), comm.channel("bulk")
    product = torch.empty(4096, 4096, device="cuda:1")
    await comm.recv(product, src=0)
    print(f"rank 1 has the product on {product.device}; it begins with {product[0, 0].item():.0f}")

    large, small = (
        torch.empty(512 * MIB, dtype=torch.uint8, device="cuda:1"),
        torch.empty(16, device="cuda:1"),
    )
    receiving = bulk.recv(large, src=0)
    for _ in range(20):
        await urgent.recv(small, src=0)
        await urgent.send(small, dst=0)
    await receiving
    assert large.min().item() == large.max().item() == 7


async def main() -> None:
    torch.cuda.set_device(0)
    async with aiocomm.spawn(worker, n=1) as comm:
        urgent, bulk = comm.channel("urgent", priority=aiocomm.Priority.HIGH), comm.channel("bulk")
        a = torch.ones(4096, 4096, device="cuda:0")
        # The product is queued on torch's current stream. The send waits on the GPU; nothing here does.
        await comm.send(a @ a, dst=1)

        large = torch.full((512 * MIB,), 7, dtype=torch.uint8, device="cuda:0")
        small = torch.zeros(16, device="cuda:0")
        sending = bulk.send(large, dst=1)
        rounds = []
        for _ in range(20):
            before = time.perf_counter()
            await urgent.send(small, dst=1)
            await urgent.recv(small, src=1)
            rounds.append(time.perf_counter() - before)
        await sending
        print(f"there and back beside 512 MiB of bulk: median {sorted(rounds)[10] * 1e6:.0f} µs")
        paths = comm.links["cuda"].statistics().messages_by_path
        print("messages by path:", ", ".join(f"{path} {count}" for path, count in paths.items() if count))


if __name__ == "__main__":
    if DEVICES < 2:
        found = (
            "torch is not installed (pip install torch)" if DEVICES < 0 else f"torch sees {DEVICES} GPU(s)"
        )
        print(f"skipped: {found}; this example needs two GPUs")
    else:
        asyncio.run(main())

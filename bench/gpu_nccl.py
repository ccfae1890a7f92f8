"""NCCL's send and recv through torch, one process a GPU."""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING, Any

from .sizes import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Measure bandwidth, half round trips and collectives, with the host waiting for each."""
    import torch
    import torch.distributed as dist

    large = int(arguments["large"])
    port = control.swap(20000 + os.getpid() % 20000)
    port = port if role else 20000 + os.getpid() % 20000
    torch.cuda.set_device(role)
    dist.init_process_group(
        "nccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=role,
        world_size=2,
        device_id=torch.device("cuda", role),
    )
    data = torch.ones(large, dtype=torch.uint8, device="cuda")
    into = torch.zeros_like(data)

    def one_way(nbytes: int, count: int, outstanding: int) -> float:
        def turn() -> None:
            for _ in range(outstanding):
                if role == 0:
                    dist.send(data[:nbytes], 1)
                else:
                    dist.recv(into[:nbytes], 0)
            torch.cuda.synchronize()

        turn()
        control.swap("ready")
        start = time.perf_counter()
        for _ in range(count):
            turn()
        return nbytes * count * outstanding / (time.perf_counter() - start) / 1e9

    found: Metrics = {
        "gbytes_s/1GiB": one_way(large, arguments["repeats"] // 2, 2),
        "gbytes_s_serial/1GiB": one_way(large, arguments["repeats"], 1),
        "gbytes_s/16MiB": one_way(16 * MIB, 25, 8),
    }

    def both() -> None:
        requests = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, data, 1 - role), dist.P2POp(dist.irecv, into, 1 - role)]
        )
        for request in requests:
            request.wait()
        torch.cuda.synchronize()

    both()
    control.swap("ready")
    start = time.perf_counter()
    for _ in range(arguments["repeats"]):
        both()
    found["gbytes_s_both/1GiB"] = large * arguments["repeats"] / (time.perf_counter() - start) / 1e9
    halves = []
    small = 64 * KIB
    for _ in range(500):
        start = time.perf_counter()
        for sender in (0, 1):
            if role == sender:
                dist.send(data[:small], 1 - role)
            else:
                dist.recv(into[:small], 1 - role)
            torch.cuda.synchronize()
        halves.append((time.perf_counter() - start) / 2)
    found["half_us/64KiB"] = statistics.median(halves[100:]) * 1e6
    for name, nbytes, count in (("256MiB", 256 * MIB, arguments["repeats"]), ("64KiB", small, 300)):
        floats = data[:nbytes].view(torch.float32)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            dist.all_reduce(floats)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        found[f"all_reduce_us/{name}"] = statistics.median(times[len(times) // 4 :]) * 1e6
    for name, nbytes, count in (
        ("128MiB", 128 * MIB, arguments["repeats"]),
        ("1MiB", MIB, 300),
        ("64KiB", small, 300),
    ):
        times = []
        for _ in range(count):
            start = time.perf_counter()
            dist.all_gather_into_tensor(into[: 2 * nbytes], data[:nbytes])
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        median = statistics.median(times[len(times) // 4 :])
        if name == "128MiB":
            found[f"all_gather_gbytes_s/{name}"] = nbytes / median / 1e9
        else:
            found[f"all_gather_us/{name}"] = median * 1e6
    control.swap("done")
    return found if role == 0 else {}

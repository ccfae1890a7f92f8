"""Suite `gpu-moe`: dispatch and combine on all GPUs of a host, beside the usual path through torch and NCCL.

That path, as serving programs have it: counts by all_to_all_single, read by the host; the tokens, once to
each rank, by index_select and all_to_all_single with splits; back the same way, and index_add. It moves no
lists of experts and applies no weights, as ours does. Both are taken by the same processes, turn by turn.
Expert numbers are on the GPU, partial sums travel in bfloat16.

Metrics:
    us/dispatch/TOKENS, us/combine/TOKENS: Microseconds of ours, median over turns, of the slowest rank.
    us/both/TOKENS: Dispatch and combine of a turn, likewise; p90/both/TOKENS its 90th percentile.
    nccl_us/..., nccl_p90/...: The same of the other path.
    of_nccl/TOKENS: The ratio of the medians.
    host_us/dispatch/TOKENS, host_us/combine/TOKENS: Microseconds of ours outside the one call into the
        extension, likewise; stage_us/OPERATION/TOKENS/STAGE: on rank 0, of all of its stages.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING, Any

from . import moe_host, pair, work
from .gpu_driver import Driver, missing
from .model import Column, Rule, Subject, Suite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics, Options

_NAME = "aiocomm-gpu"
_EXPERTS, _CHOICES, _HIDDEN = 256, 8, 7168
_WARM = 5  # turns that do not count
_BATCHES = ((16, 200), (128, 200), (4096, 20))


def _missing() -> str:
    try:
        import torch
    except ImportError:
        return "pip install torch"
    return missing() or ("" if torch.cuda.is_available() else "needs two GPUs")


def _subjects(options: Options) -> list[Subject]:
    chosen = not options.peers or _NAME in options.peers
    return [Subject(_NAME, "ours", "nvlink", _missing())] if chosen else []


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    scale = 4 if options.quick else 1
    batches = [(tokens, max(5, count // scale)) for tokens, count in _BATCHES]
    program = f"{__package__}.gpu_moe:child"
    found: Metrics = pair.run(program, {"batches": batches}, options.timeout_s)[0]
    return found


class _Nccl:
    """Dispatch and combine on torch's all_to_all_single."""

    def __init__(self, size: int) -> None:
        self._size = size

    def dispatch(self, x: Any, ids: Any) -> Any:
        import torch
        import torch.distributed as dist

        size = self._size
        owner = torch.div(ids, _EXPERTS // size, rounding_mode="floor")
        goes = torch.zeros((size, len(x)), dtype=torch.bool, device=x.device)
        goes.scatter_(0, owner.t(), True)
        counts = goes.sum(1)
        taken = torch.empty_like(counts)
        dist.all_to_all_single(taken, counts)
        give, take = torch.stack((counts, taken)).tolist()
        index = goes.nonzero()[:, 1]
        rows = torch.empty((sum(take), x.shape[1]), dtype=x.dtype, device=x.device)
        dist.all_to_all_single(rows, x.index_select(0, index), take, give)
        return rows, index, give, take

    def combine(self, outputs: Any, state: Any, out: Any) -> None:
        import torch
        import torch.distributed as dist

        _, index, give, take = state
        back = torch.empty((sum(give), outputs.shape[1]), dtype=outputs.dtype, device=outputs.device)
        dist.all_to_all_single(back, outputs, give, take)
        out.zero_()
        out.index_add_(0, index, back)


class _Batch:
    """What a rank dispatches, and a turn of either way: seconds of dispatch and of combine."""

    def __init__(self, comm: Any, nccl: _Nccl, tokens: int) -> None:
        import torch

        self._comm, self._nccl = comm, nccl
        self._device = device = torch.device("cuda", comm.rank)
        seeded = torch.Generator(device=device).manual_seed(comm.rank)
        scores = torch.rand((tokens, _EXPERTS), device=device, generator=seeded)
        self._ids = scores.topk(_CHOICES).indices
        self._x = torch.ones((tokens, _HIDDEN), dtype=torch.bfloat16, device=device)
        self._weights = torch.full(self._ids.shape, 1 / _CHOICES, device=device)
        self._out, self._other = torch.empty_like(self._x), torch.empty_like(self._x)
        self.stages: dict[str, list[dict[str, float]]] = {"dispatch": [], "combine": []}

    async def _begin(self) -> float:
        import torch

        torch.cuda.synchronize()
        await self._comm.barrier()
        return time.perf_counter()

    async def ours(self) -> tuple[float, float]:
        """Dispatch, what stands for the experts, combine."""
        import torch

        comm = self._comm
        start = await self._begin()
        begin_ns = time.monotonic_ns()
        came = await comm.dispatch(self._x, self._ids, self._weights, experts=_EXPERTS)
        middle = time.perf_counter()
        self._note("dispatch", begin_ns)
        rows = torch.as_tensor(came.tokens, device=self._device).view(torch.bfloat16)
        outputs = rows[torch.from_numpy(came.rows).to(self._device)]
        begin = await self._begin()
        begin_ns = time.monotonic_ns()
        await comm.combine(outputs, came, out=self._out, wire="bfloat16")
        end = time.perf_counter()
        self._note("combine", begin_ns)
        return middle - start, end - begin

    def _note(self, operation: str, begin_ns: int) -> None:
        told = moe_host.stages(self._comm, operation, begin_ns, time.monotonic_ns())
        if told is not None:
            self.stages[operation].append(told)

    async def theirs(self) -> tuple[float, float]:
        """The same through torch."""
        import torch

        start = await self._begin()
        state = self._nccl.dispatch(self._x, self._ids)
        torch.cuda.synchronize()
        middle = time.perf_counter()
        outputs = state[0].clone()
        begin = await self._begin()
        self._nccl.combine(outputs, state, self._other)
        torch.cuda.synchronize()
        return middle - start, time.perf_counter() - begin

    def check(self) -> None:
        """Weights sum to one; by the other way each rank that a token went to adds it once."""
        import torch

        if not torch.allclose(self._out.float(), torch.ones_like(self._out, dtype=torch.float32), atol=0.02):
            raise AssertionError("what came back is not the weighted sum of what went out")
        owner = torch.div(self._ids, _EXPERTS // self._comm.size, rounding_mode="floor")
        ranks = torch.nn.functional.one_hot(owner, self._comm.size).amax(1).sum(1)
        if not torch.allclose(self._other.float(), ranks[:, None].float().expand_as(self._other)):
            raise AssertionError("what the other way brought back is not the sum of what went out")


async def layers(comm: Any, batches: list[list[int]], port: int) -> Metrics:
    """What every rank runs."""
    import numpy as np
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", comm.rank)
    torch.cuda.set_device(device)
    address = f"tcp://127.0.0.1:{port}"
    where: dict[str, Any] = {"rank": comm.rank, "world_size": comm.size, "device_id": device}
    await asyncio.to_thread(dist.init_process_group, "nccl", init_method=address, **where)
    nccl = _Nccl(comm.size)
    found: Metrics = {}

    async def slowest(times: list[float]) -> tuple[float, float]:
        mine = np.array(times)
        every = np.empty((comm.size, len(mine)))
        await comm.all_gather(every, mine)
        worst = every.max(0).tolist()
        return statistics.median(worst) * 1e6, statistics.quantiles(worst, n=10)[-1] * 1e6

    for tokens, count in batches:
        batch = _Batch(comm, nccl, tokens)
        ours, theirs = [], []
        for _ in range(count + _WARM):
            ours.append(await batch.ours())
            theirs.append(await batch.theirs())
        batch.check()
        del ours[:_WARM], theirs[:_WARM]
        for place, name in enumerate(("dispatch", "combine")):
            found[f"us/{name}/{tokens}"], _ = await slowest([turn[place] for turn in ours])
            found[f"nccl_us/{name}/{tokens}"], _ = await slowest([turn[place] for turn in theirs])
            told = batch.stages[name]
            mine = np.array([statistics.median(map(moe_host.host_us, told)) if told else np.nan])
            every = np.empty((comm.size, 1))
            await comm.all_gather(every, mine)
            if not np.isnan(every).any():
                found[f"host_us/{name}/{tokens}"] = float(every.max())
            for stage in moe_host.STAGES[name] if told else ():
                found[f"stage_us/{name}/{tokens}/{stage}"] = statistics.median(one[stage] for one in told)
        for name, turns in (("", ours), ("nccl_", theirs)):
            median, spread = await slowest([sum(turn) for turn in turns])
            found[f"{name}us/both/{tokens}"], found[f"{name}p90/both/{tokens}"] = median, spread
        found[f"of_nccl/{tokens}"] = found[f"us/both/{tokens}"] / found[f"nccl_us/both/{tokens}"]
    await comm.barrier()
    dist.destroy_process_group()
    return found


async def _all(batches: list[list[int]], port: int) -> Metrics:
    import aiocomm

    count = Driver(0).count()
    world = aiocomm.spawn(layers, count - 1, batches, port, links=("shm", "cuda"), warmup=True)
    async with asyncio.timeout(240), world as comm:
        return {"gpus": float(count)} | await layers(comm, batches, port)


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Role 0 starts the others by itself."""
    if role:
        return {}
    port = _free_port()
    return work.run_on("asyncio", lambda: _all(arguments["batches"], port))


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _columns(options: Options) -> tuple[Column, ...]:
    found = [Column("gpus", "GPUs", 0, "neither")]
    for tokens, _ in _BATCHES:
        found += [
            Column(f"us/dispatch/{tokens}", f"dispatch\n{tokens} tokens, µs", 0),
            Column(f"us/combine/{tokens}", "combine\nµs", 0),
            Column(f"us/both/{tokens}", "both\nµs", 0),
            Column(f"p90/both/{tokens}", "both\n90 %, µs", 0),
            Column(f"nccl_us/both/{tokens}", "NCCL\nboth, µs", 0),
            Column(f"nccl_p90/both/{tokens}", "NCCL\n90 %, µs", 0),
            Column(f"of_nccl/{tokens}", "÷ NCCL", 3),
            Column(f"host_us/dispatch/{tokens}", "host outside\ndispatch, µs", 0),
            Column(f"host_us/combine/{tokens}", "host outside\ncombine, µs", 0),
        ]
    return tuple(found)


SUITE = Suite(
    "gpu-moe",
    "all GPUs of a host: dispatch and combine of a mixture of experts, beside NCCL through torch",
    _subjects,
    measure,
    _columns,
    tuple(
        Rule(f"dispatch + combine of {tokens} tokens ÷ NCCL", _NAME, f"of_nccl/{tokens}", "<=", bound)
        for tokens, bound in ((16, 0.5), (128, 0.5))
    ),
)

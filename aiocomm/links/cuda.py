"""CUDA: GPUs, how they reach each other, what other processes can open of it, what is in the way."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiocomm.config import driver_library
from aiocomm.links import _cuda_probe as probe
from aiocomm.links._capabilities import Capabilities
from aiocomm.links._container import in_container, private_namespaces
from aiocomm.links._cuda_driver import CudaError, Device, NoDriver, connection, device, open_driver
from aiocomm.links._report import Check, Report, State, is_built, package_version, read_text

if TYPE_CHECKING:
    from aiocomm.links._cuda_driver import Driver

__all__ = ["CAPABILITIES", "discover"]

CAPABILITIES = Capabilities(
    reach="GPUs of one host; beside another link, which carries its control messages",
    memory="GPU; between GPU and host, too",
    paths="copy engine (push or pull) over NVLink or PCIe, through pinned host memory",
    wake="as the link beside it",
    loss="as the link beside it; a failed GPU by its driver",
    reductions="GPU arrays, by kernels; those of float8 are compiled, and have not run on a GPU yet",
    experts="GPU arrays, by kernels that read the others' memory, or copy engines",
)

OLDEST_DRIVER: Final = 12000  # the native link's kOldestDriver
_NVIDIA, _DISPLAY = "0x10de", ("0x0300", "0x0302")  # PCI vendor; classes VGA and 3D controller
_VISIBLE = "CUDA_VISIBLE_DEVICES"

_ADVICE: Final = {
    34: "the library is the toolkit's stub: put the driver's own folder before it in LD_LIBRARY_PATH",
    46: "another process holds the GPU alone: nvidia-smi -c DEFAULT; or it has failed: see nvidia-smi",
    100: f"no GPU is shown to this process: see nvidia-smi, {_VISIBLE}, the container's GPUs (--gpus all)",
    101: f"{_VISIBLE} names a GPU that is not there: see nvidia-smi -L",
    802: "start the service nvidia-fabricmanager (machines with NVSwitch need it)",
    803: "the kernel module is of another release than the library: reboot, or reload it",
    804: "the compatibility library does not fit this GPU: remove cuda-compat from LD_LIBRARY_PATH",
    999: "load the kernel modules (modprobe nvidia nvidia_uvm), and see dmesg for Xid messages",
}


def discover() -> Report:
    """Look for GPUs on the bus, ask the driver about them, and try what other processes can open of them."""
    on_bus = _on_bus()
    seen = Check("PCI bus", State.INFO, f"NVIDIA GPUs: {', '.join(on_bus)}" if on_bus else "no NVIDIA GPU")
    driver_checks, devices = _driver(bool(on_bus))
    checks = (seen, *driver_checks, _packages())
    machine = f"the machine has {devices} usable GPU(s)" if devices else "the machine has no usable GPU"
    return Report("cuda", built=is_built("cuda"), summary=machine, checks=checks)


def _on_bus() -> list[str]:
    return sorted(
        device.name
        for device in Path("/sys/bus/pci/devices").glob("*")
        if read_text(device / "vendor") == _NVIDIA and (read_text(device / "class") or "")[:6] in _DISPLAY
    )


def _driver(has_gpu: bool) -> tuple[list[Check], int]:
    """Checks of the driver and of all that it shows, and how many GPUs can be used."""
    try:
        driver = open_driver(driver_library())
    except NoDriver as error:
        library = driver_library() or "libcuda.so.1"
        return [
            Check("driver library", State.FAILED, f"{library} does not load ({error})", _no_driver(has_gpu))
        ], 0
    try:
        version = driver.version()
        supports = f"supports CUDA {version // 1000}.{version % 1000 // 10}, asked through {driver.source}"
        if version < OLDEST_DRIVER:
            need = f"{OLDEST_DRIVER // 1000}.{OLDEST_DRIVER % 1000 // 10}"
            advice = f"the link needs CUDA {need}: install NVIDIA's driver 525 or newer"
            return [Check("driver library", State.FAILED, f"too old: {supports}", advice)], 0
        driver.start()
        count = driver.count()
    except CudaError as error:
        advice = _ADVICE.get(error.code, "nvidia-smi tells more")
        module = read_text("/proc/driver/nvidia/version")
        running = f"; the kernel module is {module.splitlines()[0]}" if module else ""
        return [Check("driver library", State.FAILED, f"{error}{running}", advice)], 0
    checks = [Check("driver library", State.OK, supports)]
    if not count:
        return [*checks, Check("devices", State.FAILED, "the driver shows none", _ADVICE[100])], 0
    devices = []
    for index in range(count):
        try:
            devices.append(device(driver, index))
        except CudaError as error:
            advice = _ADVICE.get(error.code, "nvidia-smi tells more; other GPUs go on")
            checks.append(Check(f"device {index}", State.LIMITED, str(error), advice))
    if not devices:
        checks.append(
            Check("devices", State.FAILED, "none answers", "see nvidia-smi and dmesg for Xid messages")
        )
        return checks, 0
    checks += [_device(one) for one in devices]
    if len(devices) > 1:
        checks.append(_topology(driver, devices))
    return [*checks, *_sharing(), _namespaces()], len(devices)


def _no_driver(has_gpu: bool) -> str:
    if in_container():
        return (
            "start the container with the GPUs: --gpus all (Docker), --device nvidia.com/gpu=all (Podman), "
            "resources.limits nvidia.com/gpu (Kubernetes)"
        )
    return "install NVIDIA's driver, 525 or newer" if has_gpu else ""


def _device(found: Device) -> Check:
    major, minor = found.capability
    detail = (
        f"{found.name}, {found.memory / 2**30:.0f} GiB, compute capability {major}.{minor}, PCI {found.pci}, "
        f"{found.uuid}"
    )
    return Check(f"device {found.index}", State.OK, detail)


def _topology(driver: Driver, devices: list[Device]) -> Check:
    """Pairs by the way in which they reach each other."""
    by_way: dict[str, list[str]] = {}
    try:
        for first, second in itertools.combinations(devices, 2):
            way = connection(driver, first.index, second.index)
            by_way.setdefault(way, []).append(f"{first.index}-{second.index}")
    except CudaError as error:
        return Check("topology", State.LIMITED, str(error), "nvidia-smi topo -m shows what is connected")
    apart = by_way.pop("", [])
    parts = [f"{way}: {', '.join(pairs)}" for way, pairs in sorted(by_way.items())]
    if not apart:
        whole = len(by_way) == 1
        return Check("topology", State.OK, f"all by {next(iter(by_way))}" if whole else "; ".join(parts))
    advice = (
        "these pairs are copied through the host; where the machine could do better: nvidia-smi topo -p2p r, "
        "and the BIOS's settings ACS and IOMMU"
    )
    return Check(
        "topology", State.LIMITED, "; ".join([*parts, f"no peer access: {', '.join(apart)}"]), advice
    )


def _sharing() -> list[Check]:
    """What another process can open, by way of allocation. Tried."""
    try:
        outcome = probe.try_exports()
    except OSError as error:
        advice = (
            "no context could be made on GPU 0: see nvidia-smi for its memory, its mode and its processes"
        )
        return [Check("memory of other processes", State.FAILED, str(error), advice)]
    legacy, vmm, pool = (outcome.get(name, "not tried") for name in (probe.LEGACY, probe.VMM, probe.POOL))
    checks = []
    if legacy == "ok":
        checks.append(
            Check("cudaMalloc memory", State.OK, "opened by another process (torch and CuPy by default)")
        )
    else:
        checks.append(Check("cudaMalloc memory", State.LIMITED, legacy, _refused()))
    if vmm == "ok":
        detail = "descriptors opened by another process (torch's expandable_segments)"
        checks.append(Check("VMM memory", State.OK, detail))
    else:
        advice = "torch: leave expandable_segments off, so that memory can be shared in the other way"
        checks.append(Check("VMM memory", State.LIMITED, vmm, advice))
    if pool == "ok":
        checks.append(Check("cudaMallocAsync memory", State.OK, "opened by another process"))
    else:
        detail = "the default pool cannot be shared: it is copied through the host, slower"
        checks.append(Check("cudaMallocAsync memory", State.INFO, detail))
    return checks


def _refused() -> str:
    private = private_namespaces()
    if private:
        flags = " ".join(f"--{kind}=host" for kind in private)
        return f"the container has namespaces of its own ({', '.join(private)}): start it with {flags}"
    if os.path.exists("/dev/dxg"):
        return "WSL 2 does not offer CUDA IPC: memory is copied through the host"
    if in_container():
        return "the container's security profile may be in the way: try --security-opt seccomp=unconfined"
    return "MIG partitions and some virtual GPUs do not offer CUDA IPC: memory is copied through the host"


def _namespaces() -> Check:
    private = private_namespaces()
    if not private:
        return Check("namespaces", State.INFO, "the machine's own: all its processes can share GPU memory")
    detail = (
        f"own {' and '.join(private)} namespace: processes outside of it cannot open this one's GPU memory"
    )
    advice = (
        f"ranks in several containers of one machine: {' '.join(f'--{kind}=host' for kind in private)} "
        "(Docker, Podman), or hostPID and hostIPC, or one pod (Kubernetes)"
    )
    return Check("namespaces", State.INFO, detail, advice)


def _packages() -> Check:
    wanted = ("cuda-python", "cuda-bindings", "cupy-cuda12x", "cupy-cuda13x", "torch")
    found = [f"{name} {version}" for name in wanted if (version := package_version(name))]
    known = package_version("cuda-python") or package_version("cuda-bindings")
    advice = "" if known else "for CuPy and cuda-python: pip install 'aiocomm[cuda13]', or [cuda12]"
    return Check("packages", State.INFO, ", ".join(found) or "none of cuda-python, CuPy, torch", advice)

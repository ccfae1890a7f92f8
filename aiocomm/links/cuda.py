"""CUDA: what this machine has for the GPU link. Whether this build carries the link is asked of it."""

from __future__ import annotations

import ctypes
from pathlib import Path

from aiocomm.links._capabilities import Capabilities
from aiocomm.links._report import Check, Report, State, is_built, package_version, read_text

__all__ = ["CAPABILITIES", "discover"]

CAPABILITIES = Capabilities(
    reach="GPUs of one host",
    memory="GPU",
)

_NVIDIA, _DISPLAY = "0x10de", ("0x0300", "0x0302")  # PCI vendor; classes VGA and 3D controller
_NAME_BYTES = 100


def discover() -> Report:
    """Look for GPUs on the PCI bus, the driver library, its devices, and the Python packages."""
    on_bus = _on_bus()
    seen = Check("PCI bus", State.INFO, f"NVIDIA GPUs: {', '.join(on_bus)}" if on_bus else "no NVIDIA GPU")
    checks = (seen, *_driver(bool(on_bus)), _packages())
    devices = sum(check.name.startswith("device ") for check in checks)
    machine = f"the machine has {devices} usable GPU(s)" if devices else "the machine has no usable GPU"
    return Report("cuda", built=is_built("cuda"), summary=machine, checks=checks)


def _on_bus() -> list[str]:
    return sorted(
        device.name
        for device in Path("/sys/bus/pci/devices").glob("*")
        if read_text(device / "vendor") == _NVIDIA and (read_text(device / "class") or "")[:6] in _DISPLAY
    )


def _driver(has_gpu: bool) -> list[Check]:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        advice = (
            "install the NVIDIA driver; a container needs the NVIDIA runtime (--gpus all)" if has_gpu else ""
        )
        return [Check("driver library", State.FAILED, "libcuda.so.1 does not load", advice)]
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    supports = f"supports CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    code = cuda.cuInit(0)
    if code:
        advice = "nvidia-smi tells more: the kernel module may be missing, or its version another"
        return [
            Check("driver library", State.FAILED, f"{supports}; cuInit gives {_error(cuda, code)}", advice)
        ]
    checks = [Check("driver library", State.OK, supports)]
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    for index in range(count.value):
        name = ctypes.create_string_buffer(_NAME_BYTES)
        nbytes = ctypes.c_size_t()
        cuda.cuDeviceGetName(name, _NAME_BYTES, index)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(nbytes), index)
        detail = f"{name.value.decode(errors='replace')}, {nbytes.value / 2**30:.0f} GiB"
        checks.append(Check(f"device {index}", State.OK, detail))
    if not count.value:
        checks.append(Check("devices", State.FAILED, "the driver shows none", "see CUDA_VISIBLE_DEVICES"))
    return checks


def _error(cuda: ctypes.CDLL, code: int) -> str:
    name = ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(name))
    return (name.value or b"").decode() or str(code)


def _packages() -> Check:
    wanted = ("cuda-python", "cupy-cuda12x", "cupy-cuda13x", "torch")
    found = [f"{name} {version}" for name in wanted if (version := package_version(name))]
    advice = "" if package_version("cuda-python") else "once the link exists: pip install 'aiocomm[cuda13]'"
    return Check("packages", State.INFO, ", ".join(found) or "none of cuda-python, CuPy, torch", advice)

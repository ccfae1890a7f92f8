"""Boots a Debian kernel with soft-RoCE under emulation, over this machine's own root, for one command."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))

import image
import initramfs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
GUEST = HERE / "guest"
MEMORY, CPUS = "3G", 2
BOOT_S = 120
"""What booting and switching off may take besides the command; 15 s on two idle cores."""

_KERNELS = Path("/boot")
_PASSED = ("VIRTUAL_ENV",)
_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "ip": "iproute2",
    "rdma": "iproute2",
    "modprobe": "kmod",
    "mke2fs": "e2fsprogs",
    "ib_write_bw": "perftest",
}
_FILES = {
    "/usr/lib/x86_64-linux-gnu/libibverbs.so.1": "libibverbs1",
    "/usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav*.so": "ibverbs-providers",
    "/usr/lib/python3/dist-packages/pyverbs": "python3-pyverbs",
}
# Emulated processors share one time stamp counter, which the kernel does not know; the clock that it takes
# instead is a device: each look at it leaves the emulated code, and takes the emulator's global lock.
_CLOCK = "tsc=reliable clocksource=tsc"
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Outcome:
    """How a run in the guest ended. `status` is the command's; None if it did not get that far."""

    status: int | None
    results: Path
    wall_s: float
    reason: str = ""

    @property
    def output(self) -> str:
        """All that the command printed."""
        return _text(self.results / "output.log")

    @property
    def console(self) -> str:
        """What kernel and boot scripts printed."""
        return _text(self.results / "console.log")

    @property
    def junit(self) -> Path:
        """Where pytest inside writes its results."""
        return self.results / "junit.xml"

    def explained(self) -> str:
        """A failure in words: reason, ends of output and console, and where the rest lies."""
        lines = [self.reason or f"the command ended with status {self.status}", f"after {self.wall_s:.0f} s"]
        for name, text in (("output", self.output), ("console", self.console)):
            lines += [f"--- end of its {name}:", *text.splitlines()[-40:]]
        return "\n".join([*lines, f"--- all of it: {self.results}"])


def kernel() -> tuple[Path, Path] | None:
    """The newest kernel here that has soft-RoCE as a module: its image, and the folder of its modules."""
    for vmlinuz in sorted(_KERNELS.glob("vmlinuz-*"), key=lambda p: p.stat().st_mtime, reverse=True):
        modules = Path("/lib/modules") / vmlinuz.name.removeprefix("vmlinuz-")
        if os.access(vmlinuz, os.R_OK) and list(
            modules.glob("kernel/drivers/infiniband/sw/rxe/rdma_rxe.ko*")
        ):
            return vmlinuz, modules
    return None


def missing() -> dict[str, str]:
    """What the guest needs and this machine lacks, with Debian's package of it; empty if all is there."""
    if platform.machine() != "x86_64":
        return {f"an x86-64 machine (this is {platform.machine()})": ""}
    lacks = {tool: package for tool, package in _TOOLS.items() if not _which(tool)}
    for pattern, package in _FILES.items():
        path = Path(pattern)
        if not list(path.parent.glob(path.name)):
            lacks[path.name] = package
    if not lacks.get("busybox") and not _is_static(Path(_which("busybox") or "")):
        lacks["a static busybox"] = "busybox-static"
    if kernel() is None:
        lacks["a readable /boot/vmlinuz-* with rdma_rxe"] = "linux-image-amd64"
    return lacks


def run(
    command: Sequence[str],
    results: Path,
    *,
    limit_s: float = 300,
    environment: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Boot, run `command` in the checkout with two hosts of two rails, switch off.

    Args:
        command: Program and arguments; `python` and `pytest` are those of this interpreter, and pytest
            leaves `junit.xml`.
        results: An existing folder; inside it is `/run/aiocomm` and writable. Nothing else stays.
        limit_s: For the command, which is then interrupted; `BOOT_S` later the machine is killed.
        environment: Variables for the command, besides a plain PATH and what a virtual environment needs.
        progress: Called with each piece of output as it comes.

    Raises:
        RuntimeError: Something is missing here.
    """
    found = kernel()
    lacks = missing()
    if found is None or lacks:
        raise RuntimeError(f"missing: {', '.join(lacks)}: {advice(lacks)}")
    vmlinuz, modules = found
    init = (GUEST / "init.sh").read_text()
    (results / "initramfs").write_bytes(initramfs.build(modules, Path(_which("busybox") or ""), init))
    with tempfile.TemporaryDirectory(dir=results) as staging:
        mounts = image.build(_which("mke2fs") or "", results / "image", Path(staging), CHECKOUT)
    (results / "mounts").write_text("".join(f"{name}\n{folder}\n" for name, folder in mounts.items()))
    for script in ("first.sh", "hosts.sh"):
        shutil.copy(GUEST / script, results / script)
    (results / "environment.sh").write_text(_environment(environment or {}, limit_s))
    (results / "job.sh").write_text(f"exec {shlex.join(_resolved(command))}\n")
    for name in ("status", "output.log", "junit.xml"):
        (results / name).unlink(missing_ok=True)

    started = time.monotonic()
    with (results / "console.log").open("wb") as console:
        qemu = subprocess.Popen(
            _qemu(vmlinuz, results), stdin=subprocess.DEVNULL, stdout=console, stderr=console
        )
        try:
            ended = _follow(qemu, results / "output.log", started + limit_s + BOOT_S, progress)
        finally:
            qemu.kill()
            qemu.wait()
            for name in ("image", "initramfs"):
                (results / name).unlink()
    wall_s = time.monotonic() - started
    status = _text(results / "status").strip()
    if status:
        return Outcome(int(status), results, wall_s)
    reason = (
        "the guest stopped before the command ended"
        if ended
        else f"the guest was killed at {limit_s + BOOT_S:g} s"
    )
    return Outcome(None, results, wall_s, reason)


def advice(lacks: Mapping[str, str]) -> str:
    """How to get what is missing."""
    packages = sorted({package for package in lacks.values() if package})
    return f"apt-get install {' '.join(packages)}" if packages else "there is no remedy on this machine"


def _resolved(command: Sequence[str]) -> list[str]:
    program, *arguments = command
    if program == "pytest":
        options = ["-p", "no:cacheprovider", "--junitxml=/run/aiocomm/junit.xml"]
        return [sys.executable, "-m", "pytest", *options, *arguments]
    return [sys.executable if program == "python" else program, *arguments]


def _environment(extra: Mapping[str, str], limit_s: float) -> str:
    path = f"{Path(sys.executable).parent}:{_SYSTEM_PATH}"
    values = {
        "PATH": path,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # the installed package, not the checkout
        "OPENBLAS_NUM_THREADS": "1",
        "AIOCOMM_RDMA_GUEST": "1",  # tests that only the guest can run look for it
        "JOB_FOLDER": str(CHECKOUT),
        "JOB_LIMIT_S": f"{limit_s:g}",
        **{name: os.environ[name] for name in _PASSED if name in os.environ},
        **extra,
    }
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())


def _qemu(vmlinuz: Path, results: Path) -> list[str]:
    share = "local,security_model=none,multidevs=remap"
    return [
        _which("qemu-system-x86_64") or "",
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
        # Emulation everywhere: a /dev/kvm that opens may still fail, and then it does so by ending qemu.
        *("-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-smp", str(CPUS), "-m", MEMORY),
        *("-kernel", str(vmlinuz), "-initrd", str(results / "initramfs")),
        *("-append", f"console=ttyS0 loglevel=5 panic=-1 mitigations=off random.trust_cpu=on {_CLOCK}"),
        *("-fsdev", f"{share},id=root,path=/,readonly=on"),
        *("-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
        *("-drive", f"file={results / 'image'},format=raw,readonly=on,if=none,id=image"),
        *("-device", "virtio-blk-pci,drive=image"),
        *("-fsdev", f"{share},id=results,path={results}"),
        *("-device", "virtio-9p-pci,fsdev=results,mount_tag=results"),
    ]


def _follow(
    qemu: subprocess.Popen[bytes], log: Path, deadline: float, progress: Callable[[str], None] | None
) -> bool:
    """Wait for the machine to switch off; False at the deadline. Passes the log on as it grows."""
    position = 0
    while True:
        try:
            qemu.wait(timeout=0.5)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
        if progress and log.exists():
            with log.open("rb") as file:
                file.seek(position)
                piece = file.read()
            position += len(piece)
            if piece:
                progress(piece.decode(errors="replace"))
        if ended or time.monotonic() > deadline:
            return ended


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}")


def _is_static(binary: Path) -> bool:
    """Whether an ELF file names no interpreter, that is, needs no libraries."""
    try:
        return b"/ld-linux" not in binary.read_bytes()[:4096]
    except OSError:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

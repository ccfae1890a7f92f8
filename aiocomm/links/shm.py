"""Shared memory: whether processes can share segments, ring each other and read each other's memory.

Everything is tried with real child processes: what a container's seccomp filter or the kernel's ptrace scope
forbids cannot be read off reliably. Two *siblings* try cross-memory attach, as peers are siblings.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import select
import socket
import subprocess
import sys

from aiocomm.links._capabilities import Capabilities
from aiocomm.links._report import Check, Report, State, is_built, read_text

__all__ = ["CAPABILITIES", "discover"]

CAPABILITIES = Capabilities(
    reach="processes of one host",
    memory="host",
    paths="eager, mapped, cma, stream",
    wake="one eventfd write, only if the peer sleeps",
    loss="hang-up of the pair's Unix socket, or its pidfd",
    encryption="not needed: nothing leaves the host",
)

_TIMEOUT_S = 60.0  # to start a process takes seconds on a busy machine
_HUGE = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"

# Writes the shared page, rings, says where its secret is, and keeps it until the link is closed.
_HOLDER = """
import ctypes, mmap, os, socket, sys
link = socket.socket(fileno=int(sys.argv[1]))
_, (segment, bell), _, _ = socket.recv_fds(link, 16, 2)
page = mmap.mmap(segment, mmap.PAGESIZE)
page[:7] = b"aiocomm"
os.eventfd_write(bell, 1)
secret = ctypes.create_string_buffer(b"aiocomm")
link.send(str(ctypes.addressof(secret)).encode())
link.recv(16)
"""

_READER = """
import ctypes, sys
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
libc = ctypes.CDLL(None, use_errno=True)
into = ctypes.create_string_buffer(7)
local, remote = Vector(ctypes.addressof(into), 7), Vector(int(sys.argv[2]), 7)
libc.process_vm_readv.restype = ctypes.c_ssize_t
n = libc.process_vm_readv(int(sys.argv[1]), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
sys.exit(0 if n == 7 and into.raw == b"aiocomm" else ctypes.get_errno() or 255)
"""


def discover() -> Report:
    """Try segments, descriptor passing, doorbells and cross-memory attach; read limits."""
    checks = [*_try_sharing(), _cores(), _huge_pages(), _memlock()]
    states = {check.name: check.state for check in checks}
    if State.FAILED in states.values():
        summary = "processes on this machine cannot share memory"
    elif states.get("cross-memory attach") is State.OK:
        summary = "shared segments, and single copies between ordinary arrays"
    else:
        summary = "shared segments; large ordinary arrays are copied twice"
    return Report("shm", built=is_built("shm"), summary=summary, checks=tuple(checks))


def _try_sharing() -> list[Check]:
    checks = []
    try:
        segment = os.memfd_create("aiocomm-doctor", os.MFD_CLOEXEC)
        os.ftruncate(segment, mmap.PAGESIZE)
    except OSError as error:
        return [
            Check("memfd", State.FAILED, f"memfd_create: {error.strerror}", _filter_advice("memfd_create"))
        ]
    checks.append(Check("memfd", State.OK, "anonymous segments: nothing is left behind after a crash"))
    try:
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        os.close(segment)
        return [
            *checks,
            Check("eventfd", State.FAILED, f"eventfd: {error.strerror}", _filter_advice("eventfd2")),
        ]
    ours, theirs = socket.socketpair()
    try:
        ours.settimeout(_TIMEOUT_S)
        command = [sys.executable, "-I", "-S", "-c", _HOLDER, str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL) as holder:
            theirs.close()
            try:
                checks += _try_with(holder.pid, ours, segment, bell)
            finally:
                ours.close()  # the holder reads the end of file and exits
                holder.kill()
    finally:
        ours.close()
        theirs.close()
        os.close(segment)
        os.close(bell)
    return checks


def _try_with(pid: int, link: socket.socket, segment: int, bell: int) -> list[Check]:
    try:
        socket.send_fds(link, [b"descriptors"], [segment, bell])
        address = int(link.recv(32) or b"0")
    except OSError as error:
        address, reason = 0, error.strerror or str(error)
    else:
        reason = "the child did not answer"
    with mmap.mmap(segment, mmap.PAGESIZE) as page:
        written = page[:7] == b"aiocomm"
    if not (address and written):
        return [Check("descriptor passing", State.FAILED, f"SCM_RIGHTS: {reason}", _filter_advice("sendmsg"))]
    checks = [Check("descriptor passing", State.OK, "SCM_RIGHTS: a child mapped and wrote our segment")]
    rung = bool(select.select([bell], [], [], _TIMEOUT_S)[0]) and os.eventfd_read(bell) == 1
    state = State.OK if rung else State.FAILED
    checks.append(
        Check("eventfd", state, "a child rang our doorbell" if rung else "a child's ring did not arrive")
    )
    checks.append(_try_pidfd(pid))
    checks.append(_try_attach(pid, address))
    return checks


def _try_pidfd(pid: int) -> Check:
    try:
        os.close(os.pidfd_open(pid))
    except OSError as error:
        detail = f"pidfd_open: {error.strerror}; a peer's death is seen by its socket only"
        return Check("pidfd", State.LIMITED, detail, _filter_advice("pidfd_open"))
    return Check("pidfd", State.OK, "the death of a peer is seen at once")


def _try_attach(pid: int, address: int) -> Check:
    name = "cross-memory attach"
    try:
        code = _read_sibling(pid, address)
    except subprocess.TimeoutExpired:
        detail = f"not known: a child did not answer within {_TIMEOUT_S:.0f} s"
        return Check(name, State.LIMITED, detail, "ask again when this machine is less busy")
    if code == 0:
        return Check(name, State.OK, "process_vm_readv between two sibling processes")
    scope = read_text("/proc/sys/kernel/yama/ptrace_scope")
    detail = f"process_vm_readv: {os.strerror(code) if code < 255 else 'wrong data'}"
    cost = "; large ordinary arrays go through a bounce ring: two copies instead of one"
    if code == errno.EPERM and scope not in (None, "0"):
        # At 1 a process may open itself; above, only root and the administrator can.
        ways = "AIOCOMM_CMA=allow, or " if scope == "1" else ""
        advice = f"kernel.yama.ptrace_scope is {scope}: {ways}sysctl kernel.yama.ptrace_scope=0 allows it"
    else:
        advice = _filter_advice("process_vm_readv", "SYS_PTRACE")
    return Check(name, State.LIMITED, detail + cost, advice + ", or use arrays of aiocomm.empty()")


def _read_sibling(pid: int, address: int) -> int:
    command = [sys.executable, "-I", "-S", "-c", _READER, str(pid), str(address)]
    return subprocess.run(command, check=False, timeout=_TIMEOUT_S, stderr=subprocess.DEVNULL).returncode


def _filter_advice(call: str, capability: str = "") -> str:
    """Why a system call may be refused: a container's filter is the usual reason, and is seen from here."""
    status = read_text("/proc/self/status") or ""
    mode = next((line.split()[1] for line in status.splitlines() if line.startswith("Seccomp:")), "0")
    if mode == "0":
        return f"the kernel refuses {call} (no seccomp filter here): see its version and security modules"
    extra = f", or start it with --cap-add={capability}" if capability else ""
    return f"a seccomp filter is active (container): allow {call} in its profile{extra}"


def _cores() -> Check:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    detail = f"{usable} usable of {present}"
    if usable < 2:
        return Check(
            "cores", State.LIMITED, detail, "with one core, run() without spin=: a spinner only delays"
        )
    return Check("cores", State.INFO, detail)


def _huge_pages() -> Check:
    text = read_text(_HUGE) or ""
    mode = text.partition("[")[2].partition("]")[0] or "unknown"
    memory = read_text("/proc/meminfo") or ""
    fields = dict(line.split(":", 1) for line in memory.splitlines() if ":" in line)
    reserved = fields.get("HugePages_Total", "0").strip()
    advice = (
        f"as root, for a faster first touch of large arrays: echo advise > {_HUGE}" if mode == "never" else ""
    )
    return Check(
        "huge pages", State.INFO, f"transparent for shared memory: {mode}; reserved: {reserved}", advice
    )


def _memlock() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:g} MiB"
    return Check("locked memory", State.INFO, f"{shown} (not needed by this link)")

"""Tries what GPU memory other processes can open: `python -m aiocomm.links._cuda_probe`.

Without arguments it allocates by each way, exports what can be, starts itself again to open the exports, and
prints one line per way: `name=outcome`, outcome being "ok" or what failed. A context on the GPU exists only
while it runs.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import socket
import subprocess
import sys
from typing import Any, Final

from aiocomm.config import driver_library
from aiocomm.links._cuda_driver import LIBRARY

__all__ = ["LEGACY", "POOL", "VMM", "try_exports"]

LEGACY, VMM, POOL = "cudaMalloc", "VMM", "cudaMallocAsync"

_NBYTES: Final = 2 << 20
_DESCRIPTOR: Final = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_PYTHON: Final = (sys.executable, "-P")  # not what lies in the working folder
_TIMEOUT_S: Final = 60.0  # contexts on a busy machine take seconds


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("unused", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


class _Refused(Exception):
    pass


class _Cuda:
    def __init__(self) -> None:
        self.library = ctypes.CDLL(driver_library() or LIBRARY)
        self.context = ctypes.c_void_p()
        self("cuInit", ctypes.c_uint(0))
        self("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), 0)
        self("cuCtxSetCurrent", self.context)

    def __call__(self, name: str, *arguments: Any) -> None:
        code = int(getattr(self.library, name)(*arguments))
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(code, ctypes.byref(text))
            raise _Refused(f"{name.removesuffix('_v2')} gives {(text.value or b'?').decode()} ({code})")

    def legacy_handle(self, allocate: str, *more: Any) -> bytes:
        address, handle = ctypes.c_uint64(), _Handle()
        self(allocate, ctypes.byref(address), ctypes.c_size_t(_NBYTES), *more)
        self("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle)

    def open_legacy(self, handle: bytes) -> None:
        address = ctypes.c_uint64()
        self(
            "cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), ctypes.c_uint(1)
        )
        self("cuIpcCloseMemHandle", address)

    def descriptor(self) -> int:
        block, descriptor = ctypes.c_uint64(), ctypes.c_int(-1)
        wanted = _Properties(1, _DESCRIPTOR, _Location(1, 0), None, 0)
        zero = ctypes.c_ulonglong(0)
        self("cuMemCreate", ctypes.byref(block), ctypes.c_size_t(_NBYTES), ctypes.byref(wanted), zero)
        self("cuMemExportToShareableHandle", ctypes.byref(descriptor), block, _DESCRIPTOR, zero)
        return descriptor.value

    def open_descriptor(self, descriptor: int) -> None:
        block = ctypes.c_uint64()
        self("cuMemImportFromShareableHandle", ctypes.byref(block), ctypes.c_void_p(descriptor), _DESCRIPTOR)
        self("cuMemRelease", block)


def try_exports() -> dict[str, str]:
    """What other processes can open, by way of allocation: "ok", or what failed.

    Raises:
        OSError: the child cannot be started, or does not end.
    """
    command = [*_PYTHON, "-m", __name__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"no answer within {_TIMEOUT_S:.0f} s") from error
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    if not found:
        raise OSError((done.stderr.strip().splitlines() or ["no answer"])[-1])
    return found


def _export() -> None:
    cuda = _Cuda()
    handles: dict[str, bytes] = {}
    descriptor, outcome = -1, {}
    for name, allocate, more in ((LEGACY, "cuMemAlloc_v2", ()), (POOL, "cuMemAllocAsync", (None,))):
        try:
            handles[name] = cuda.legacy_handle(allocate, *more)
        except _Refused as error:
            outcome[name] = str(error)
    try:
        descriptor = cuda.descriptor()
    except _Refused as error:
        outcome[VMM] = str(error)
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine, theirs:
        child = subprocess.Popen(
            [*_PYTHON, "-m", __spec__.name, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        for name, handle in handles.items():
            mine.send(name.encode() + b"=" + handle)
            outcome[name] = mine.recv(4096).decode() or "the other process ended"
        if descriptor >= 0:
            rights = array.array("i", [descriptor])
            mine.sendmsg([f"{VMM}=".encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            outcome[VMM] = mine.recv(4096).decode() or "the other process ended"
    child.wait()
    for name, text in outcome.items():
        print(f"{name}={text}")


def _open(descriptor: int) -> None:
    with socket.socket(fileno=descriptor) as channel:
        cuda = None
        while True:
            message, ancillary, _, _ = channel.recvmsg(4096, socket.CMSG_SPACE(4))
            if not message:
                return
            name, _, handle = message.partition(b"=")
            try:
                cuda = cuda or _Cuda()
                if name.decode() == VMM:
                    received = array.array("i", ancillary[0][2][:4])[0]
                    cuda.open_descriptor(received)
                else:
                    cuda.open_legacy(handle)
                channel.send(b"ok")
            except _Refused as error:
                channel.send(str(error).encode())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with contextlib.suppress(BrokenPipeError):
            _open(int(sys.argv[1]))
    else:
        try:
            _export()
        except _Refused as refused:
            sys.exit(str(refused))

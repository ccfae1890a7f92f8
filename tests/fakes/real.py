"""What tests on a real GPU ask of the driver: bytes in pieces, free memory, a kernel that takes its time."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from fakes.gpu import Address, DeviceArray, Handle, Stream, driver

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["free_bytes", "launch_late", "pieces", "read", "write"]

PIECE: Final = 64 << 20

# Waits for some nanoseconds, and then fills memory: a model's step that takes long.
LATE: Final = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry late(.param .u64 to, .param .u64 nbytes, .param .u32 value, .param .u64 ns)
{
  .reg .pred %p<3>;
  .reg .u32 %r<8>;
  .reg .u64 %d<9>;
  ld.param.u64 %d1, [to];
  ld.param.u64 %d2, [nbytes];
  ld.param.u32 %r1, [value];
  ld.param.u64 %d3, [ns];
  cvta.to.global.u64 %d1, %d1;
  mov.u64 %d4, %globaltimer;
  add.u64 %d4, %d4, %d3;
WAIT:
  mov.u64 %d5, %globaltimer;
  setp.lt.u64 %p1, %d5, %d4;
  @%p1 bra WAIT;
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mov.u32 %r4, %tid.x;
  mad.lo.u32 %r5, %r2, %r3, %r4;
  cvt.u64.u32 %d6, %r5;
  mov.u32 %r6, %nctaid.x;
  mul.lo.u32 %r7, %r6, %r3;
  cvt.u64.u32 %d7, %r7;
FILL:
  setp.ge.u64 %p2, %d6, %d2;
  @%p2 bra DONE;
  add.u64 %d8, %d1, %d6;
  st.global.u8 [%d8], %r1;
  add.u64 %d6, %d6, %d7;
  bra FILL;
DONE:
  ret;
}
\0"""


def pieces(nbytes: int) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """Offsets and random bytes, the same ones in every process."""
    for at in range(0, nbytes, PIECE):
        generator = np.random.Generator(np.random.SFC64([nbytes, at]))
        yield at, np.frombuffer(generator.bytes(min(PIECE, nbytes - at)), np.uint8)


def write(address: int, data: np.ndarray[Any, Any]) -> None:
    """Copy from the host, to the device in use."""
    driver()("cuMemcpyHtoD", Address(address), Handle(data.ctypes.data), ctypes.c_size_t(data.nbytes))


def read(address: int, nbytes: int) -> np.ndarray[Any, Any]:
    """Copy to the host, from the device in use."""
    data = np.empty(nbytes, np.uint8)
    driver()("cuMemcpyDtoH", Handle(data.ctypes.data), Address(address), ctypes.c_size_t(nbytes))
    return data


def free_bytes(device: int) -> int:
    """Memory of a device that nobody has."""
    driver().use(device)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    driver()("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    return free.value


def launch_late(array: DeviceArray, value: int, stream: Stream, ns: int = 200_000_000) -> None:
    """Queue a kernel that waits for `ns` and then makes every byte of an array `value`."""
    driver().use(array.device)
    module, kernel = Handle(), Handle()
    driver()("cuModuleLoadData", ctypes.byref(module), LATE)
    driver()("cuModuleGetFunction", ctypes.byref(kernel), module, b"late")
    values = (
        Address(array.address),
        ctypes.c_uint64(array.nbytes),
        ctypes.c_uint32(value),
        ctypes.c_uint64(ns),
    )
    pointers = (ctypes.c_void_p * 4)(*(ctypes.addressof(one) for one in values))
    driver()("cuLaunchKernel", kernel, 64, 1, 1, 256, 1, 1, 0, Handle(stream.handle), pointers, None)

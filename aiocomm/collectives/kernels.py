"""Reductions on a GPU: kernels that are compiled on first use, and the stream on which they run.

Rules:
- A kernel is compiled by NVRTC, through cuda-python, for the GPU at hand: nobody needs nvcc. Without it, host
  arrays are reduced as ever, and a GPU array is refused with what to install.
- Kernels run in the primary context, on a stream of this module's own, which waits for the user's stream. The
  host waits for nothing: messages of what a kernel writes wait for the stream, as those of any stream do.
- At most `sm_budget` blocks run at once, so no more streaming multiprocessors are taken from the model.
- Elements of 16 and 8 bits are reduced in float32 and rounded after each pair, as NumPy does.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aiocomm._numbers import number
from aiocomm.collectives.driver import driver
from aiocomm.errors import UsageError
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from aiocomm._device import Description

__all__ = [
    "THREADS",
    "Kernels",
    "Scratch",
    "check_budget",
    "device_of",
    "kernel_source",
    "kernels_of",
    "types",
]

THREADS: Final = 512  # of a block
_RANKS: Final = 16  # whose arrays one kernel combines: aiocomm_native/bindings/combining.hpp
_VECTORS: Final = 4  # of 16 bytes, that a thread has under way at once

_BF16_LOAD: Final = "__uint_as_float((unsigned)x << 16)"
_BF16_SAVE: Final = (
    "x != x ? (unsigned short)0x7fff : (unsigned short)"
    "((__float_as_uint(x) + 0x7fff + (__float_as_uint(x) >> 16 & 1)) >> 16)"
)


@dataclass(frozen=True, slots=True)
class _Type:
    """How a dtype is stored and computed with, in CUDA C++."""

    stored: str
    value: str
    load: str = "x"
    save: str = "x"
    preamble: str = ""


_HALF: Final = """
__device__ float half_load(unsigned short x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
  return f;
}
__device__ unsigned short half_save(float x) {
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
"""
# float8 by whole numbers, since instructions for it came with sm_89. Numbers below the normal ones are whole
# multiples of one step: adding 2^23 steps rounds to those, to even.
_FLOAT8: Final = """
__device__ float float8_load(unsigned char x) {{
  const unsigned size = x & 0x7f, sign = (unsigned)(x & 0x80) << 24;
  if (size > {most}) return __uint_as_float(sign | (size == {infinity} ? 0x7f800000 : 0x7fffffff));
  const float value = size >> {bits} ? __uint_as_float((size << (23 - {bits})) + ((127 - {bias}) << 23))
                                     : (float)size * __uint_as_float((128 - {bias} - {bits}) << 23);
  return __uint_as_float(__float_as_uint(value) | sign);
}}
__device__ unsigned char float8_save(float x) {{
  unsigned size = __float_as_uint(x) & 0x7fffffff;
  const unsigned sign = __float_as_uint(x) >> 24 & 0x80;
  if (size > 0x7f800000) return sign | 0x7f;
  if (size >= (128 - {bias}) << 23) {{
    size -= (127 - {bias}) << 23;
    size = (size + (1u << (22 - {bits})) - 1 + (size >> (23 - {bits}) & 1)) >> (23 - {bits});
  }} else {{
    const unsigned steps = (151 - {bias} - {bits}) << 23;
    size = __float_as_uint(__uint_as_float(size) + __uint_as_float(steps)) - steps;
  }}
  return sign | (size > {most} ? {beyond} : size);
}}
"""
# What is beyond the largest number becomes infinite, or where there is no infinity, not a number.
_E4M3: Final = _FLOAT8.format(bits=3, bias=7, most="0x7e", infinity="0x80", beyond="0x7f")
_E5M2: Final = _FLOAT8.format(bits=2, bias=15, most="0x7b", infinity="0x7c", beyond="0x7c")
_TYPES: Final = {
    "float64": _Type("double", "double"),
    "float32": _Type("float", "float"),
    "float16": _Type("unsigned short", "float", "half_load(x)", "half_save(x)", _HALF),
    "bfloat16": _Type("unsigned short", "float", _BF16_LOAD, _BF16_SAVE),
    "float8_e4m3fn": _Type("unsigned char", "float", "float8_load(x)", "float8_save(x)", _E4M3),
    "float8_e5m2": _Type("unsigned char", "float", "float8_load(x)", "float8_save(x)", _E5M2),
    "int8": _Type("signed char", "signed char"),
    "uint8": _Type("unsigned char", "unsigned char"),
    "int16": _Type("short", "short"),
    "uint16": _Type("unsigned short", "unsigned short"),
    "int32": _Type("int", "int"),
    "uint32": _Type("unsigned", "unsigned"),
    "int64": _Type("long long", "long long"),
    "uint64": _Type("unsigned long long", "unsigned long long"),
}
# As NumPy's: what is not a number stays so.
_OPERATORS: Final = {
    "sum": "a + b",
    "prod": "a * b",
    "min": "a < b || a != a ? a : b",
    "max": "a > b || a != a ? a : b",
}
_SOURCE: Final = """// aiocomm reduction: {dtype} {op}
typedef {stored} stored_t;
typedef {value} value_t;
typedef unsigned long long size_type;
{preamble}
__device__ value_t load(stored_t x) {{ return {load}; }}
__device__ stored_t save(value_t x) {{ return {save}; }}
__device__ stored_t combined(stored_t l, stored_t r) {{
  const value_t a = load(l), b = load(r);
  return save((value_t)({expression}));
}}
constexpr unsigned kPer = 16 / sizeof(stored_t), kVectors = {vectors};
struct alignas(16) Vector {{ stored_t at[kPer]; }};
__device__ stored_t divided(stored_t x, unsigned by) {{ return save((value_t)(load(x) / (value_t)by)); }}
// The arrays of all ranks, as they are mapped here: this rank's block of each.
struct Arrays {{
  size_type in[{ranks}], out[{ranks}], count;
  unsigned size, by;
}};

extern "C" __global__ void __launch_bounds__({threads})
combine(stored_t* out, const stored_t* left, const stored_t* right, size_type n) {{
  const size_type stride = (size_type)gridDim.x * blockDim.x;
  const size_type first = (size_type)blockIdx.x * blockDim.x + threadIdx.x;
  size_type done = 0;
  if ((((size_type)out | (size_type)left | (size_type)right) & 15) == 0) {{
    const size_type vectors = n / kPer;
    for (size_type i = first; i < vectors; i += stride * kVectors) {{
      Vector l[kVectors], r[kVectors];
#pragma unroll
      for (unsigned v = 0; v < kVectors; ++v)
        if (i + v * stride < vectors) {{
          l[v] = ((const Vector*)left)[i + v * stride];
          r[v] = ((const Vector*)right)[i + v * stride];
        }}
#pragma unroll
      for (unsigned v = 0; v < kVectors; ++v)
        if (i + v * stride < vectors) {{
#pragma unroll
          for (unsigned k = 0; k < kPer; ++k) l[v].at[k] = combined(l[v].at[k], r[v].at[k]);
          ((Vector*)out)[i + v * stride] = l[v];
        }}
    }}
    done = vectors * kPer;
  }}
  for (size_type i = done + first; i < n; i += stride) out[i] = combined(left[i], right[i]);
}}

extern "C" __global__ void __launch_bounds__({threads}) divide(stored_t* out, size_type n, unsigned by) {{
  const size_type stride = (size_type)gridDim.x * blockDim.x;
  for (size_type i = (size_type)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
    out[i] = divided(out[i], by);
}}

extern "C" __global__ void __launch_bounds__({threads}) combine_all(const Arrays all) {{
  const size_type stride = (size_type)gridDim.x * blockDim.x;
  const size_type first = (size_type)blockIdx.x * blockDim.x + threadIdx.x;
  size_type bits = 0, done = 0;
  for (unsigned rank = 0; rank < all.size; ++rank) bits |= all.in[rank] | all.out[rank];
  if ((bits & 15) == 0) {{
    const size_type vectors = all.count / kPer;
    for (size_type i = first; i < vectors; i += stride * kVectors) {{
      Vector total[kVectors], part[kVectors];
#pragma unroll
      for (unsigned v = 0; v < kVectors; ++v)
        if (i + v * stride < vectors) total[v] = ((const Vector*)all.in[0])[i + v * stride];
      for (unsigned rank = 1; rank < all.size; ++rank) {{
#pragma unroll
        for (unsigned v = 0; v < kVectors; ++v)
          if (i + v * stride < vectors) part[v] = ((const Vector*)all.in[rank])[i + v * stride];
#pragma unroll
        for (unsigned v = 0; v < kVectors; ++v)
          if (i + v * stride < vectors) {{
#pragma unroll
            for (unsigned k = 0; k < kPer; ++k) total[v].at[k] = combined(total[v].at[k], part[v].at[k]);
          }}
      }}
#pragma unroll
      for (unsigned v = 0; v < kVectors; ++v)
        if (i + v * stride < vectors) {{
          if (all.by)
#pragma unroll
            for (unsigned k = 0; k < kPer; ++k) total[v].at[k] = divided(total[v].at[k], all.by);
          for (unsigned rank = 0; rank < all.size; ++rank)
            ((Vector*)all.out[rank])[i + v * stride] = total[v];
        }}
    }}
    done = vectors * kPer;
  }}
  for (size_type i = done + first; i < all.count; i += stride) {{
    stored_t total = ((const stored_t*)all.in[0])[i];
    for (unsigned rank = 1; rank < all.size; ++rank)
      total = combined(total, ((const stored_t*)all.in[rank])[i]);
    if (all.by) total = divided(total, all.by);
    for (unsigned rank = 0; rank < all.size; ++rank) ((stored_t*)all.out[rank])[i] = total;
  }}
}}
"""


def types() -> list[str]:
    """Names of the dtypes that are reduced on GPUs."""
    return list(_TYPES)


def kernel_source(dtype: str, op: str) -> str:
    """CUDA C++ of a reduction.

    Raises:
        UsageError: there is none for this dtype.
    """
    kind = _TYPES.get(dtype)
    if kind is None:
        raise UsageError(f"cannot reduce GPU arrays of dtype {dtype}: choose from {', '.join(_TYPES)}")
    return _SOURCE.format(
        dtype=dtype,
        op=op,
        stored=kind.stored,
        value=kind.value,
        preamble=kind.preamble,
        load=kind.load,
        save=kind.save,
        expression=_OPERATORS[op],
        vectors=_VECTORS,
        threads=THREADS,
        ranks=_RANKS,
    )


def compiled(source: str, architecture: str) -> bytes:
    """Machine code for one architecture, `sm_90` for example, by NVRTC.

    Raises:
        UsageError: NVRTC is not installed, or refuses.
    """
    try:
        from cuda.bindings import nvrtc

        code, program = nvrtc.nvrtcCreateProgram(source.encode(), b"aiocomm.cu", 0, [], [])
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"what runs on GPUs is compiled by NVRTC, which is not there ({error}): pip install "
            "'aiocomm[cuda12]' or 'aiocomm[cuda13]', whichever the driver is; or reduce host arrays, and "
            "leave sm_budget= of pages out"
        ) from error
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(code):
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise UsageError(f"NVRTC does not compile a kernel for {architecture}: {log.decode().strip()}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    image = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, image)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(image)


_MOST_SMS: Final = 1 << 16
_Address = ctypes.c_uint64
_Handle = ctypes.c_void_p
_Size = ctypes.c_uint64

_MAJOR: Final = 75
_MINOR: Final = 76
_NON_BLOCKING: Final = 1
_DISABLE_TIMING: Final = 2
_RELAXED: Final = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


def device_of(described: Description) -> int:
    """Ordinal of the GPU whose memory this is."""
    if described[3] >= 0:
        return described[3]
    return _core.device_of(described[1])


def check_budget(sm_budget: int | None) -> int | None:
    """A number of multiprocessors.

    Raises:
        UsageError: it is none.
    """
    if sm_budget is None:
        return None
    budget = number("sm_budget", sm_budget)
    if not 1 <= budget <= _MOST_SMS:
        raise UsageError(f"sm_budget={budget}: how many streaming multiprocessors, 1 to {_MOST_SMS}")
    return budget


class Scratch:
    """Device memory of a call, kept for the next."""

    def __init__(self, kernels: Kernels, nbytes: int) -> None:
        self._kernels = kernels
        self.nbytes = nbytes
        address = _Address()
        with kernels.current():
            driver()("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        self.address = int(address.value)

    @property
    def device(self) -> int:
        """Ordinal of its GPU."""
        return self._kernels.device

    def __del__(self) -> None:
        if address := getattr(self, "address", 0):
            _core.free_later(self._kernels.device, address, False)


class Kernels:
    """What one GPU computes for collectives; made once per process and GPU."""

    def __init__(self, device: int) -> None:
        self.device = device
        self._context = _Handle()
        self._stream, self._event = _Handle(), _Handle()
        self._functions: dict[tuple[str, str, str], _Handle] = {}
        call = driver()
        call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        least, greatest = ctypes.c_int(), ctypes.c_int()
        with self.current():
            call("cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
            call("cuStreamCreateWithPriority", ctypes.byref(self._stream), _NON_BLOCKING, greatest)
            call("cuEventCreate", ctypes.byref(self._event), _DISABLE_TIMING)

    @property
    def context(self) -> int:
        """Handle of the GPU's primary context."""
        return self._context.value or 0

    @property
    def stream(self) -> int:
        """Handle of the stream that the kernels run on."""
        return self._stream.value or 0

    @functools.cached_property
    def reach_peers(self) -> bool:
        """Whether they reach memory of every other GPU that this process sees."""
        count, yes = ctypes.c_int(), ctypes.c_int()
        driver()("cuDeviceGetCount", ctypes.byref(count))
        for other in range(count.value):
            if other != self.device:
                driver()("cuDeviceCanAccessPeer", ctypes.byref(yes), self.device, other)
                if not yes.value:
                    return False
        return True

    def current(self) -> AbstractContextManager[None]:
        """Make the GPU's primary context this thread's, and put back what it was."""
        return _Current(self._context)

    def prepare(self, dtype: str, op: str) -> None:
        """Compile and load, before other ranks wait for it."""
        self._function(dtype, op, "combine")

    def follow(self, stream: int) -> None:
        """Have what comes wait for the work that a user's stream has now."""
        with self.current():
            driver()("cuEventRecord", self._event, _Handle(stream))
            driver()("cuStreamWaitEvent", self._stream, self._event, 0)

    def combine(
        self, dtype: str, op: str, out: int, left: int, right: int, count: int, itemsize: int, sm_budget: int
    ) -> None:
        """Queue `out = left (op) right` of `count` elements at these addresses."""
        function = self._function(dtype, op, "combine")
        blocks = _blocks(count * itemsize, sm_budget)
        self._launch(function, blocks, _Address(out), _Address(left), _Address(right), _Size(count))

    def divide(
        self, dtype: str, op: str, out: int, count: int, itemsize: int, by: int, sm_budget: int
    ) -> None:
        """Queue `out /= by`."""
        function = self._function(dtype, op, "divide")
        blocks = _blocks(count * itemsize, sm_budget)
        self._launch(function, blocks, _Address(out), _Size(count), ctypes.c_uint(by))

    def over_all(self, dtype: str, op: str) -> int:
        """Handle of the function that combines the arrays of all ranks."""
        return self._function(dtype, op, "combine_all").value or 0

    def entry(self, source: str, name: str) -> int:
        """Handle of a function of some other source, which is compiled and loaded once."""
        return self.entries(source, (name,))[0]

    def entries(self, source: str, names: Sequence[str]) -> list[int]:
        """The same of several functions of it."""
        keys = {name: (source, "", name) for name in names}
        if any(key not in self._functions for key in keys.values()):
            self._load(source, keys)
        return [self._functions[key].value or 0 for key in keys.values()]

    def loaded(self, source: str, name: str) -> int:
        """The same of one that `entry` has loaded, or 0."""
        found = self._functions.get((source, "", name))
        return 0 if found is None else found.value or 0

    def synchronize(self) -> None:
        """Wait on the host until nothing is queued, so that a failed call touches nothing any more."""
        with self.current():
            driver()("cuStreamSynchronize", self._stream)

    def _launch(self, function: _Handle, blocks: int, *values: Any) -> None:
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        with self.current():
            driver()(
                "cuLaunchKernel",
                function,
                *(blocks, 1, 1),
                *(THREADS, 1, 1),
                0,
                self._stream,
                pointers,
                None,
            )

    def _function(self, dtype: str, op: str, name: str) -> _Handle:
        key = (dtype, op, name)
        if key not in self._functions:
            entries = ("combine", "combine_all", "divide")
            self._load(kernel_source(dtype, op), {entry: (dtype, op, entry) for entry in entries})
        return self._functions[key]

    def _load(self, source: str, entries: dict[str, tuple[str, str, str]]) -> None:
        call, module = driver(), _Handle()
        major, minor = ctypes.c_int(), ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, self.device)
        call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, self.device)
        image = compiled(source, f"sm_{major.value}{minor.value}")
        _core.begin_long_call()
        try:
            with self.current():
                call("cuModuleLoadData", ctypes.byref(module), image)
                for entry, key in entries.items():
                    function = _Handle()
                    call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
                    self._functions[key] = function
        finally:
            _core.end_long_call()


class _Current:
    """Makes a context current, apart from graphs that other threads capture: those forbid to allocate."""

    __slots__ = ("_context", "_mode")

    def __init__(self, context: _Handle) -> None:
        self._context = context
        self._mode = ctypes.c_int(_RELAXED)

    def __enter__(self) -> None:
        driver()("cuCtxPushCurrent_v2", self._context)
        driver()("cuThreadExchangeStreamCaptureMode", ctypes.byref(self._mode))

    def __exit__(self, *_: object) -> None:
        driver()("cuThreadExchangeStreamCaptureMode", ctypes.byref(self._mode))
        driver()("cuCtxPopCurrent_v2", ctypes.byref(_Handle()))


def _blocks(nbytes: int, sm_budget: int) -> int:
    return max(1, min(sm_budget, -(-nbytes // (16 * THREADS))))


@functools.cache
def kernels_of(device: int) -> Kernels:
    """The kernels of one GPU.

    Raises:
        LinkError: the driver refuses.
    """
    return Kernels(device)

"""The simulated driver: building it, and what a test may do to it.

`choose()` says which driver is tested. `build()` compiles tests/fakes/cuda/ with the system's C++ compiler
into a cache folder, as libcuda.so.1: that is what AIOCOMM_LIBCUDA names. The same library object serves
native code and these bindings, so what is asked of it here concerns the driver that the link uses.

Processes that are started with another driver in mind read it from the environment:
FAKE_CUDA_DEVICES (4), FAKE_CUDA_MEMORY (bytes of each, 4 GiB), FAKE_CUDA_VERSION (13000), FAKE_CUDA_PEERS
(1; 0: no peer access), FAKE_CUDA_HIDE (entry points that are missing, by comma), FAKE_CUDA_FAIL
("name:nth:code", with "nth+" all from there on), FAKE_CUDA_LOST ("ordinal:code"), FAKE_CUDA_PAUSE
("device:engine"), FAKE_CUDA_REPORT (file for accesses to what is not there), and CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import gc
import os
from pathlib import Path
from typing import Final

from fakes.compiled import shared_library
from fakes.gpu import Gate

__all__ = ["Engine", "Simulator", "build", "choose"]

_SOURCE: Final = Path(__file__).parent / "cuda"
_WAIT_MS: Final = 10_000  # after which an engine that should move does not


class Engine(enum.IntEnum):
    """The engines of a device; each runs on its own and in order."""

    TO_DEVICE = 0
    TO_HOST = 1
    PEER = 2
    LOCAL = 3
    HOST_FUNCTIONS = 4


@functools.cache
def choose() -> Path | None:
    """The simulated library, or None where the machine's own driver is to be tested: it has two GPUs.

    FAKE_CUDA=1 asks for the simulated one there, too; FAKE_CUDA=0 for the machine's own where it has one
    GPU, which then stands for all that a test names.
    """
    wanted = os.environ.get("FAKE_CUDA", "")
    with contextlib.suppress(OSError):
        real = ctypes.CDLL("libcuda.so.1") if wanted in ("", "0") else None
        count = ctypes.c_int()
        if (
            real
            and real.cuInit(0) == 0
            and real.cuDeviceGetCount(ctypes.byref(count)) == 0
            and count.value > (0 if wanted else 1)
        ):
            return None
    return build()


def build() -> Path:
    """Compile the library if it has changed."""
    return shared_library(_SOURCE, "libcuda.so.1")


class Simulator:
    """The simulated driver of this process, seen from a test."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("fake_calls", "fake_counter", "fake_executed", "fake_ready"):
            getattr(library, name).restype = ctypes.c_uint64
        library.fake_held.restype = ctypes.c_int64

    def fail(self, call: str, code: int, nth: int = 1, forever: bool = False) -> None:
        """Let the `nth` call of a name from now on fail, and with `forever` all after it.

        "*" is any call, "@engine" the execution of a queued copy or fill. A `code` of -1 is `std::bad_alloc`.
        """
        if call == "@engine":  # it breaks a context: no array of an earlier test is to be freed there
            gc.collect()
        self._library.fake_fail(call.encode(), ctypes.c_uint64(nth), code, int(forever))

    def lose(self, device: int, code: int = 46) -> None:
        """Let a device fall off the bus: every call that concerns it gives `code`, nothing queued goes on."""
        gc.collect()  # as above
        self._library.fake_lose_device(device, code)

    def heal(self) -> None:
        """Take back failures and lost devices. Broken contexts are as new; what was queued there is gone."""
        self._library.fake_heal()

    def hold(self, call: str) -> None:
        """Let the next call of a name stay in the driver until `let_go`, or for ten seconds."""
        self._library.fake_hold(call.encode())

    def wait_held(self) -> None:
        """Block until that call has come."""
        if not self._library.fake_wait_held():
            raise TimeoutError("nobody has made the call that is to be held up")

    def let_go(self) -> bool:
        """Let it go on. False: it has gone on by itself."""
        return bool(self._library.fake_let_go())

    def calls(self, name: str) -> int:
        """How often an entry point was called, by its name without version suffix."""
        return int(self._library.fake_calls(name.encode()))

    def counter(self, name: str) -> int:
        """ "staged_copies" (without peer access), "pageable_copies", or "bytes" moved."""
        return int(self._library.fake_counter(name.encode()))

    def held(self, name: str) -> int:
        """How many of a kind are live; the kinds are listed at `fake_held`."""
        count = int(self._library.fake_held(name.encode()))
        if count < 0:
            raise ValueError(f"no such kind: {name}")
        return count

    def violations(self) -> list[str]:
        """What would have been silent corruption on a GPU, since the last look, in this process."""
        text = ctypes.create_string_buffer(1 << 16)
        self._library.fake_take_violations(text, ctypes.c_size_t(len(text)))
        return text.value.decode().splitlines()

    def pause(self, device: int, engine: Engine) -> None:
        """Let an engine finish what it is at, and then nothing more."""
        Gate.settle()
        self._check(self._library.fake_pause(device, engine))
        Gate.shut.add((device, engine))

    def step(self, device: int, engine: Engine, count: int = 1) -> None:
        """Let a paused engine execute `count` more operations."""
        self._check(self._library.fake_step(device, engine, ctypes.c_uint64(count)))

    def resume(self, device: int, engine: Engine) -> None:
        """Let an engine run freely again."""
        self._check(self._library.fake_resume(device, engine))
        Gate.opened((device, engine))

    def stop_halfway(self, device: int, engine: Engine) -> None:
        """Let an engine stop in the middle of its next copy."""
        Gate.settle()
        self._check(self._library.fake_stop_halfway(device, engine))
        Gate.shut.add((device, engine))

    def executed(self, device: int, engine: Engine) -> int:
        """How many operations an engine has executed in all."""
        return int(self._library.fake_executed(device, engine))

    def ready(self, device: int, engine: Engine) -> int:
        """How many operations could run on an engine, the one that it is at included."""
        return int(self._library.fake_ready(device, engine))

    def wait_ready(self, device: int, engine: Engine, count: int = 1) -> None:
        """Block until so many operations could run on an engine, the one that it is at included."""
        if not self._library.fake_wait_ready(device, engine, ctypes.c_uint64(count), _WAIT_MS):
            raise TimeoutError(f"nothing came to engine {engine.name} of device {device}")

    def wait_ready_on_any(self, devices: list[int], engine: Engine) -> None:
        """Block until an operation could run on this engine of one of the devices."""
        for _ in range(_WAIT_MS):
            for device in devices:
                if self._library.fake_wait_ready(device, engine, ctypes.c_uint64(1), 1):
                    return
        raise TimeoutError(f"nothing came to engine {engine.name} of devices {devices}")

    def wait_executed(self, device: int, engine: Engine, count: int) -> None:
        """Block until an engine has executed `count` operations in all."""
        if not self._library.fake_wait_executed(device, engine, ctypes.c_uint64(count), _WAIT_MS):
            raise TimeoutError(f"engine {engine.name} of device {device} does not get to {count} operations")

    def reset(self) -> None:
        """What every test leaves: no failures, all engines running, an empty book."""
        self.heal()
        self.let_go()
        for device in range(16):
            for engine in Engine:
                self._library.fake_resume(device, engine)
                Gate.opened((device, engine))
        self.violations()

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise ValueError("no such device or engine, or it is not paused")

"""The simulated driver behaves as the real one does where the link depends on it.

Tests without the fixture `simulator` run on NVIDIA's driver, too, where there are GPUs: that is how we know.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fakes import simulated
from fakes.gpu import DeviceArray, Driver, DriverError, Handle, IpcHandle, Kind, Stream
from fakes.simulated import Engine, Simulator

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Child

INVALID_VALUE, INVALID_CONTEXT, INVALID_HANDLE, NOT_READY = 1, 201, 400, 600
ILLEGAL_ADDRESS, CAPTURE_UNSUPPORTED, CAPTURE_ISOLATION = 700, 900, 905


def random(nbytes: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def copy(
    driver: Driver, to: DeviceArray, source: DeviceArray, stream: Stream, nbytes: int | None = None
) -> None:
    driver.use(stream.device)
    driver(
        "cuMemcpyAsync",
        ctypes.c_uint64(to.address),
        ctypes.c_uint64(source.address),
        ctypes.c_size_t(source.nbytes if nbytes is None else nbytes),
        Handle(stream.handle),
    )


def attribute(driver: Driver, address: int, which: int, kind: Any = ctypes.c_uint64) -> int:
    value = kind()
    driver("cuPointerGetAttribute", ctypes.byref(value), which, ctypes.c_uint64(address))
    return int(value.value)


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("offset", [0, 1, 4099])
def test_memory_keeps_what_is_written(gpu: Driver, kind: Kind, offset: int) -> None:
    values = random(5_000_003)
    array = DeviceArray(values.size, device=1, kind=kind, offset=offset)
    assert np.array_equal(array.write(values).numpy(), values)
    array.close()


def test_attributes_tell_the_kinds_apart(gpu: Driver) -> None:
    arrays = {kind: DeviceArray(1000, device=1, kind=kind) for kind in Kind}
    ordinal, memory_type, managed, legacy = 9, 2, 8, 10
    for kind, array in arrays.items():
        assert attribute(gpu, array.address, ordinal, ctypes.c_int) == array.device
        on_host = kind is Kind.PINNED
        assert attribute(gpu, array.address, memory_type, ctypes.c_uint) == (1 if on_host else 2)
        assert attribute(gpu, array.address, managed, ctypes.c_uint) == (kind is Kind.MANAGED)
    for kind in (Kind.MALLOC, Kind.VMM, Kind.POOL):
        assert attribute(gpu, arrays[kind].address, legacy, ctypes.c_uint) == (kind is Kind.MALLOC)
    for array in arrays.values():
        array.close()


def test_a_freed_address_comes_back_under_another_buffer_id(gpu: Driver) -> None:
    first = DeviceArray(1 << 21)
    address, old_id = first.address, attribute(gpu, first.address, 7)
    first.close()
    second = DeviceArray(1 << 21)
    assert second.address == address or simulated.choose() is None  # NVIDIA's may choose another
    assert attribute(gpu, second.address, 7) != old_id
    second.close()


def test_unknown_memory_is_no_error_for_many_attributes(gpu: Driver) -> None:
    host = np.zeros(100)
    memory_type = ctypes.c_uint(99)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(memory_type))
    which = (ctypes.c_int * 1)(2)
    gpu("cuPointerGetAttributes", ctypes.c_uint(1), which, pointers, ctypes.c_uint64(host.ctypes.data))
    assert memory_type.value == 0
    with pytest.raises(DriverError, match="INVALID_VALUE"):
        attribute(gpu, host.ctypes.data, 2)


def test_a_stream_waits_for_its_gate_and_others_do_not(gpu: Driver) -> None:
    slow, free = Stream(), Stream()
    a, b = DeviceArray(100).write(np.zeros(100)), DeviceArray(100).write(np.zeros(100))
    gate = slow.gate()
    slow.fill(a, 5)
    free.fill(b, 6)
    free.synchronize()
    assert b.numpy()[0] == 6
    assert not slow.done()
    assert a.numpy()[0] == 0
    gate.open()
    slow.synchronize()
    assert a.numpy()[0] == 5
    for one in (slow, free, a, b):
        one.close()


def test_a_stream_waits_for_another_stream_by_an_event(gpu: Driver) -> None:
    first, second = Stream(0), Stream(1)
    a, b = DeviceArray(100, device=0).write(np.zeros(100)), DeviceArray(100, device=1).write(np.zeros(100))
    gate = first.gate()
    first.fill(a, 5)
    event = Handle()
    gpu.use(0)
    gpu("cuEventCreate", ctypes.byref(event), 2)
    gpu("cuEventRecord", event, Handle(first.handle))
    gpu.use(1)
    gpu("cuStreamWaitEvent", Handle(second.handle), event, 0)
    gpu("cuEventDestroy", event)  # what waits for it still does
    copy(gpu, b, a, second)
    assert not second.done()
    gate.open()
    second.synchronize()
    assert b.numpy()[99] == 5
    for one in (first, second, a, b):
        one.close()


def test_a_value_is_written_after_the_copy_before_it(gpu: Driver) -> None:
    stream, flag = Stream(), DeviceArray(1, np.uint32, kind=Kind.PINNED)
    word = flag.numpy()
    word[0] = 0
    a = DeviceArray(1000).write(np.zeros(1000))
    gate = stream.gate()
    stream.fill(a, 9)
    gpu("cuStreamWriteValue32", Handle(stream.handle), ctypes.c_uint64(flag.address), ctypes.c_uint32(77), 0)
    assert word[0] == 0
    gate.open()
    stream.synchronize()
    assert word[0] == 77
    for one in (stream, flag, a):
        one.close()


def test_the_legacy_stream_is_busy_while_a_blocking_one_is(gpu: Driver) -> None:
    streams = blocking, apart = Stream(blocking=True), Stream()
    apart.gate()
    assert gpu.code("cuStreamQuery", None) == 0
    gate = blocking.gate()
    assert gpu.code("cuStreamQuery", None) == NOT_READY
    assert not blocking.done()
    gate.open()
    blocking.synchronize()
    assert gpu.code("cuStreamQuery", None) == 0
    for one in streams:
        one.close()


def test_the_legacy_stream_waits_for_blocking_ones(gpu: Driver) -> None:
    blocking, other = Stream(blocking=True), Stream()
    a = DeviceArray(100).write(np.zeros(100))
    legacy = Stream.__new__(Stream)
    legacy.device, legacy.handle, legacy._gates = 0, 0, []
    gate = blocking.gate()
    legacy.fill(a, 3)
    assert not legacy.done()
    assert other.done()
    gate.open()
    legacy.synchronize()
    assert a.numpy()[0] == 3
    for one in (blocking, other, a):
        one.close()


def test_strided_copies(gpu: Driver) -> None:
    class Plane2D(ctypes.Structure):
        _fields_ = (
            *(
                (side + name, ctypes.c_uint if name == "Type" else ctypes.c_uint64)
                for side in ("src", "dst")
                for name in ("XInBytes", "Y", "Type", "Host", "Device", "Array", "Pitch")
            ),
            ("width", ctypes.c_size_t),
            ("height", ctypes.c_size_t),
        )

    values = random(64 * 1000)
    a, b = DeviceArray(values.size).write(values), DeviceArray((64, 300)).write(np.zeros((64, 300)))
    stream = Stream()
    plan = Plane2D(
        srcType=2, srcDevice=a.address + 17, srcPitch=1000, dstType=4, dstDevice=b.address, dstPitch=300
    )
    plan.width, plan.height = 299, 64
    gpu("cuMemcpy2DAsync", ctypes.byref(plan), Handle(stream.handle))
    stream.synchronize()
    assert np.array_equal(b.numpy()[:, :299], values.reshape(64, 1000)[:, 17 : 17 + 299])
    assert not b.numpy()[:, 299].any()
    for one in (a, b, stream):
        one.close()


def test_stale_handles_are_refused(simulator: Simulator, gpu: Driver) -> None:
    # NVIDIA's driver may crash on them.
    stream = Stream()
    handle = Handle(stream.handle)
    stream.close()
    assert gpu.code("cuStreamQuery", handle) == INVALID_HANDLE
    event = Handle()
    gpu("cuEventCreate", ctypes.byref(event), 0)
    gpu("cuEventDestroy", event)
    assert gpu.code("cuEventQuery", event) == INVALID_HANDLE
    array = DeviceArray(10)
    address = ctypes.c_uint64(array.address)
    array.close()
    assert gpu.code("cuMemFree", address) == INVALID_VALUE


def test_calls_need_a_context(gpu: Driver) -> None:
    codes = []

    def fresh() -> None:
        address = ctypes.c_uint64()
        codes.append(gpu.code("cuMemAlloc", ctypes.byref(address), ctypes.c_size_t(10)))

    thread = threading.Thread(target=fresh)
    thread.start()
    thread.join()
    assert codes == [INVALID_CONTEXT]


def test_copies_run_in_the_order_of_submission_whatever_the_stream(simulator: Simulator, gpu: Driver) -> None:
    bulk, urgent = Stream(), Stream()
    a, b = DeviceArray(1000).write(random(1000)), DeviceArray(1000).write(np.zeros(1000))
    host = [DeviceArray(100, kind=Kind.PINNED) for _ in range(2)]
    for one in host:
        one.numpy()[:] = 0
    simulator.pause(0, Engine.TO_HOST)
    before = simulator.executed(0, Engine.TO_HOST)
    for _ in range(3):
        copy(gpu, host[0], a, bulk, 100)
    copy(gpu, host[1], a, urgent, 100)
    simulator.step(0, Engine.TO_HOST, 3)
    simulator.wait_executed(0, Engine.TO_HOST, before + 3)
    assert bulk.done()
    assert not urgent.done()
    assert not host[1].numpy().any()
    simulator.resume(0, Engine.TO_HOST)
    urgent.synchronize()
    assert np.array_equal(host[1].numpy(), random(1000)[:100])
    for one in (bulk, urgent, a, b, *host):
        one.close()


def test_directions_have_engines_of_their_own(simulator: Simulator, gpu: Driver) -> None:
    blocked, free = Stream(), Stream()
    a, b = DeviceArray(1000, device=0).write(random(1000)), DeviceArray(1000, device=1).write(np.zeros(1000))
    pinned = DeviceArray(1000, kind=Kind.PINNED)
    staged = simulator.counter("staged_copies")
    simulator.pause(0, Engine.PEER)
    copy(gpu, b, a, blocked)
    simulator.wait_ready(0, Engine.PEER)
    copy(gpu, pinned, a, free)
    free.synchronize()
    assert not blocked.done()
    simulator.resume(0, Engine.PEER)
    blocked.synchronize()
    assert np.array_equal(b.numpy(), random(1000))
    gpu.use(0)
    already_enabled = (
        gpu.code("cuCtxEnablePeerAccess", gpu.contexts[1], 0) == 704
    )  # by a test before this one
    assert (simulator.counter("staged_copies") > staged) is not already_enabled
    for one in (blocked, free, a, b, pinned):
        one.close()


def test_an_engine_stops_halfway(simulator: Simulator, gpu: Driver) -> None:
    stream = Stream()
    a = DeviceArray(1000).write(random(1000))
    pinned = DeviceArray(1000, kind=Kind.PINNED)
    pinned.numpy()[:] = 0
    simulator.stop_halfway(0, Engine.TO_HOST)
    copy(gpu, pinned, a, stream)
    simulator.wait_ready(0, Engine.TO_HOST)
    while not pinned.numpy()[499]:  # random(1000)[499] is not 0
        pass
    assert not pinned.numpy()[500:].any()
    assert not stream.done()
    simulator.resume(0, Engine.TO_HOST)
    stream.synchronize()
    assert np.array_equal(pinned.numpy(), random(1000))
    for one in (stream, a, pinned):
        one.close()


def test_failures_by_name_and_count(simulator: Simulator, gpu: Driver) -> None:
    simulator.fail("cuStreamQuery", 999, nth=2)
    stream = Stream()
    assert [gpu.code("cuStreamQuery", Handle(stream.handle)) for _ in range(3)] == [0, 999, 0]
    simulator.fail("cuMemAlloc", 2, forever=True)
    for _ in range(2):
        with pytest.raises(DriverError, match="OUT_OF_MEMORY"):
            DeviceArray(10)
    simulator.heal()
    DeviceArray(10).close()
    stream.close()


def test_a_lost_device_answers_nothing_else(simulator: Simulator, gpu: Driver) -> None:
    stream, other = Stream(0), Stream(1)
    stream.gate()
    simulator.lose(0, 46)
    assert gpu.code("cuStreamQuery", Handle(stream.handle)) == 46
    with pytest.raises(DriverError, match="DEVICE_UNAVAILABLE"):
        stream.synchronize()
    assert other.done()
    simulator.heal()
    stream.close()
    other.close()


def test_an_access_out_of_bounds_breaks_the_context_and_is_noted(simulator: Simulator, gpu: Driver) -> None:
    stream = Stream()
    a, b = DeviceArray(1000), DeviceArray(1000)
    gate = stream.gate()
    copy(gpu, b, a, stream)
    address = a.address
    simulator.fail("@engine", ILLEGAL_ADDRESS)
    gate.open()
    with pytest.raises(DriverError, match="ILLEGAL_ADDRESS"):
        stream.synchronize()
    with pytest.raises(DriverError, match="ILLEGAL_ADDRESS"):
        DeviceArray(10)
    simulator.heal()
    stream.synchronize()  # what was queued is gone
    a.close()
    gpu.use(0)
    code = gpu.code(
        "cuMemcpyAsync",
        ctypes.c_uint64(b.address),
        ctypes.c_uint64(address),
        ctypes.c_size_t(1000),
        Handle(stream.handle),
    )
    assert code == INVALID_VALUE
    for one in (stream, b):
        one.close()


def test_freeing_memory_in_use_is_noted(
    simulator: Simulator, gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAKE_CUDA_REPORT")
    stream = Stream()
    a, b = DeviceArray(1000), DeviceArray(1000)
    gate = stream.gate()
    copy(gpu, b, a, stream)
    done = threading.Thread(target=a.close)  # waits, as the real one does
    done.start()
    while not (noted := simulator.violations()):
        pass
    assert "freed while 1 queued operations use it" in noted[0]
    gate.open()
    done.join()
    for one in (stream, b):
        one.close()


def test_captures(gpu: Driver) -> None:
    stream = Stream()
    a = DeviceArray(100).write(np.zeros(100))
    status = ctypes.c_int(9)
    gpu("cuStreamIsCapturing", Handle(stream.handle), ctypes.byref(status))
    assert status.value == 0
    stream.begin_capture()
    gpu("cuStreamIsCapturing", Handle(stream.handle), ctypes.byref(status))
    assert status.value == 1
    stream.fill(a, 5)
    assert stream.end_capture() == 0
    stream.synchronize()
    assert not a.numpy().any()
    stream.begin_capture()
    assert gpu.code("cuStreamQuery", Handle(stream.handle)) == CAPTURE_UNSUPPORTED
    assert stream.end_capture() != 0
    stream.close()
    a.close()


def test_a_global_capture_forbids_allocation_to_other_threads_unless_they_relax(gpu: Driver) -> None:
    stream = Stream()
    handle = Handle(stream.handle)
    codes = []

    def allocate(relaxed: bool) -> None:
        gpu.use(0)
        mode = ctypes.c_int(2)
        if relaxed:
            gpu("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        address = ctypes.c_void_p()
        codes.append(gpu.code("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(100), 1))
        if not codes[-1]:
            gpu("cuMemFreeHost", address)

    for relaxed in (True, False):
        gpu("cuStreamBeginCapture", handle, 0)
        thread = threading.Thread(target=allocate, args=(relaxed,))
        thread.start()
        thread.join()
        assert (stream.end_capture() == 0) is relaxed
    assert codes == [0, CAPTURE_UNSUPPORTED]
    stream.close()


PEER = """
import ctypes, sys
from fakes.gpu import Address, DeviceArray, Handle, IpcHandle, Stream, driver
def say(*what): print(*what, flush=True)
"""


@pytest.mark.anyio
@pytest.mark.timeout(120)  # of which its child may take most to start
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_memory_goes_to_another_process(gpu: Driver, child: Callable[..., Child]) -> None:
    values = random(100_001)
    mine = DeviceArray(values.size, device=0).write(values)
    handle = IpcHandle()
    gpu("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(mine.address))
    peer = child(
        PEER
        + """
d = driver(); d.use(1)
handle = IpcHandle.from_buffer_copy(bytes.fromhex(sys.argv[1]))
there = Address()
d("cuIpcOpenMemHandle", ctypes.byref(there), handle, 1)
again = Address()
d("cuIpcOpenMemHandle", ctypes.byref(again), handle, 1)
assert again.value == there.value
here = DeviceArray(100_001, device=1)
stream = Stream(1)
d("cuMemcpyAsync", Address(here.address), there, ctypes.c_size_t(here.nbytes), Handle(stream.handle))
stream.synchronize()
say(here.numpy().tobytes().hex()[:64])
stream.fill(here, 7)
d("cuMemcpyAsync", there, Address(here.address), ctypes.c_size_t(10), Handle(stream.handle))
stream.synchronize()
d("cuIpcCloseMemHandle", there); d("cuIpcCloseMemHandle", there)
say("closed", d.code("cuIpcCloseMemHandle", there) != 0)
""",
        bytes(handle).hex(),
    )
    assert await peer.line() == values.tobytes().hex()[:64]
    assert await peer.line() == "closed True"
    assert peer.close() == (0, "")
    assert (mine.numpy()[:11] == [*[7] * 10, values[10]]).all()
    mine.close()


def test_what_has_no_legacy_handle(gpu: Driver) -> None:
    handle, opened = IpcHandle(), ctypes.c_uint64()
    for kind in (Kind.VMM, Kind.POOL):
        array = DeviceArray(1000, kind=kind)
        assert gpu.code("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(array.address)) != 0
        array.close()
    array = DeviceArray(1000)
    gpu("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(array.address))
    # Not in the process that made it.
    assert gpu.code("cuIpcOpenMemHandle", ctypes.byref(opened), handle, 1) != 0
    array.close()


@pytest.mark.anyio
@pytest.mark.timeout(120)  # of which its child may take most to start
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_its_owner_freed_is_noticed(
    simulator: Simulator,
    gpu: Driver,
    child: Callable[..., Child],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("FAKE_CUDA_REPORT", str(tmp_path / "expected"))
    mine = DeviceArray(1000).write(random(1000))
    handle = IpcHandle()
    gpu("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(mine.address))
    peer = child(
        PEER
        + """
d = driver(); d.use(1)
handle = IpcHandle.from_buffer_copy(bytes.fromhex(sys.argv[1]))
there = Address()
d("cuIpcOpenMemHandle", ctypes.byref(there), handle, 1)
here, stream = DeviceArray(1000, device=1), Stream(1)
say("open"); sys.stdin.readline()
d("cuMemcpyAsync", Address(here.address), there, ctypes.c_size_t(1000), Handle(stream.handle))
stream.synchronize()
say(set(here.numpy().tolist()))
d("cuIpcCloseMemHandle", there)
say(d.code("cuIpcOpenMemHandle", ctypes.byref(there), handle, 1))
""",
        bytes(handle).hex(),
    )
    assert await peer.line() == "open"
    address = mine.address
    mine.close()
    mine = DeviceArray(1000).write(random(1000, 1))
    assert mine.address == address
    peer.tell("go")
    assert await peer.line() == "{221}"  # what was there is overwritten, what is there now is not shown
    assert await peer.line() == str(INVALID_VALUE)
    assert peer.close() == (0, "")
    assert "its owner has freed" in (tmp_path / "expected").read_text()
    mine.close()


def test_the_declarations_are_those_of_cuda_h(tmp_path: Path) -> None:
    folders = [
        path.parent
        for path in (*Path("/usr/local").glob("cuda*/include/cuda.h"), Path("/usr/include/cuda.h"))
    ]
    folders = [folder for folder in folders if (folder / "cuda.h").exists()]
    compiler = shutil.which("g++")
    if not folders or not compiler:
        pytest.skip("no cuda.h on this machine")
    for source in sorted((Path(simulated.__file__).parent / "cuda").glob("api_*.cpp")):
        command = [
            compiler,
            "-std=c++20",
            "-fsyntax-only",
            "-DFAKE_CUDA_REAL_HEADER",
            f"-I{folders[0]}",
            str(source),
        ]
        assert subprocess.run(command, check=False, capture_output=True, text=True).stderr == ""

"""Fixtures that the tests of the runtime share.

Coroutine tests run on asyncio, uvloop and trio by anyio's pytest plugin: `pytestmark = pytest.mark.anyio` in
the module, and the fixture `anyio_backend` below names the loops. (pytest-asyncio stays in strict mode,
unused by them.)
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import hypothesis
import pytest
from fakes import adapters, simulated
from fakes import gpu as gpus
from harness import BACKENDS, ENDLESS, LIMIT_S, Child, world

import aiocomm
from aiocomm.collectives import kernels

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    Pair = tuple[aiocomm.Communicator, aiocomm.Communicator]

# Children of tests import what is installed: a checkout as working folder is not looked into.
os.environ["PYTHONSAFEPATH"] = "1"

# No test is timed: a machine that is busy with other work is slow, not wrong.
hypothesis.settings.register_profile(
    "project", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("project")


def pytest_configure() -> None:
    """A process stays with the first driver that it loads: not that of a GPU that is not tested."""
    shown = any(os.path.exists(f"/dev/{name}") for name in ("nvidiactl", "dxg"))
    if shown and (library := simulated.choose()) is not None:
        os.environ["AIOCOMM_LIBCUDA"] = str(library)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes of `pytest`: two for all tests, none besides this one for those that are named.

    Much of the time goes to children and to waiting, so that one process leaves a core idle. On GPUs there is
    one: two would share their memory. The simulated drivers are built here, once, before there are several.
    """
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not everything or len(os.sched_getaffinity(0)) < 2 or simulated.choose() is None:
        return 0
    if adapters.HEADERS:
        adapters.build()
    return 2


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among several processes the longest files start first: the virtual machine, and what is compiled."""
    if hasattr(config, "workerinput"):
        first = ("test_rdma_vm.py", "test_native.py")
        items.sort(key=lambda item: item.path.name not in first)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell what went on inside the virtual machine, since it counts as one test."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, told in report.user_properties:
                if name == "guest" and report.when == "call":
                    terminalreporter.write_line(told)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Bound coroutine tests on their own loop: one that hangs says where, and its fixtures still close.

    Those with much to do have `pytest.mark.timeout`, by which all of them are ended in the end.
    """
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test) or pyfuncitem.get_closest_marker("anyio") is None:
        return

    own = pyfuncitem.get_closest_marker("timeout")
    limit_s = LIMIT_S if own is None else 0.9 * own.args[0]

    @functools.wraps(test)
    async def bounded(**arguments: Any) -> None:
        with anyio.fail_after(limit_s):
            await test(**arguments)

    pyfuncitem.obj = bounded


def pytest_collection_finish(session: pytest.Session) -> None:
    """What takes long once, before the first test: building the simulated driver, or making real contexts.

    And what has been collected stays: thousands of items would be gone through each time that garbage is
    looked for, which tests do that count what is left.
    """
    gc.collect()
    gc.freeze()
    wanted = {"gpu", "simulated_library"}
    if not any(wanted & set(getattr(item, "fixturenames", ())) for item in session.items):
        return
    if simulated.choose() is None:
        for device in range(gpus.driver().count):
            gpus.driver().use(device)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[gpus.Driver]:
    """The driver in use, NVIDIA's or the simulated one; on that, nothing may touch what is not its own."""
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep
    )  # children use fakes, too
    library = simulated.choose()
    if not library:
        yield gpus.driver()
        gc.collect()  # what is given back later would hold up whoever makes streams then
        return
    report = tmp_path / "violations"
    monkeypatch.setenv("AIOCOMM_LIBCUDA", str(library))
    monkeypatch.setenv("FAKE_CUDA_REPORT", str(report))
    driver = gpus.driver()
    found = simulated.Simulator(driver.library)
    found.reset()
    yield driver
    found.reset()
    assert not report.exists(), report.read_text()


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the simulated driver loads is the source."""
    if simulated.choose() is not None:
        monkeypatch.setattr(kernels, "compiled", lambda source, architecture: source.encode() + b"\0")
        kernels.kernels_of.cache_clear()


@pytest.fixture
def simulator(gpu: gpus.Driver) -> simulated.Simulator:
    """What a test may do to the simulated driver; skips on a real one."""
    if not simulated.choose():
        pytest.skip("this test breaks the driver on purpose: it needs the simulated one")
    return simulated.Simulator(gpu.library)


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS.keys())
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """The loops on which coroutine tests run."""
    return request.param


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way is held up by the test, for however long: no time limit of the runtime ends it."""
    for name, value in ENDLESS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    """Of a rendezvous, in this process."""
    where = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    async with aiocomm.connect(where, rank=0):
        yield where


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """Ranks 0 and 1 of a world, on this loop, over the default links, connected."""
    async with world(2, warmup=True) as (a, b):
        yield a, b


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    """Makes `Child` processes; ends those that are left."""
    children: list[Child] = []

    def start(source: str, *arguments: str, **environment: str) -> Child:
        children.append(Child(source, *arguments, **environment))
        return children[-1]

    yield start
    for one in children:
        if one.process.poll() is None:
            one.process.kill()
        if not one.process.stdout.closed:  # type: ignore[union-attr]
            one.close()

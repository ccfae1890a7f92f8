"""Discovery on real devices: what the doctor says of two hosts with two rails, and of what is then broken."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_link import up

from aiocomm.links import Check, State, rdma
from aiocomm.links import _rdma_verbs as verbs

if TYPE_CHECKING:
    from collections.abc import Iterator

RAILS = {"rxea0": "10.20.0.1", "rxeb0": "10.20.0.2", "rxea1": "10.21.0.1", "rxeb1": "10.21.0.2"}
NOBODY = 65534


def found() -> dict[str, Check]:
    return {check.name: check for check in rdma.discover().checks}


def system(*commands: str) -> None:
    """Run commands of the system in one shell: a process start is slow here."""
    subprocess.run(["sh", "-ec", "\n".join(commands)], check=True)


@pytest.fixture
def rail_down() -> Iterator[None]:
    """The second rail of host a, down. Later tests need its route, too."""
    system("ip link set a1 down")
    yield
    up("a1")


@pytest.fixture
def small_mtu() -> Iterator[None]:
    """The second rail of host a, with smaller packets."""
    system("ip link set a1 mtu 1200")
    yield
    system("ip link set a1 mtu 4200")


@pytest.fixture
def lonely() -> Iterator[None]:
    """A device on an interface without an IPv4 address."""
    system(
        "ip link add lonely type dummy",
        "ip link set lonely up",
        "rdma link add rxelonely type rxe netdev lonely",
    )
    yield
    system("ip link del lonely")


def test_all_ports_work_and_say_their_address() -> None:
    checks = found()
    for device, address in RAILS.items():
        check = checks[f"port {device}/1"]
        assert check.state is State.OK, check
        assert f"GID 1 ({address}: RoCE v2 with an IPv4 address" in check.detail
        assert "ACTIVE, Ethernet" in check.detail
        assert "MTU 4096 of 4096" in check.detail
    assert rdma.discover().summary == "the machine has 4 usable port(s)"


def test_pyverbs_and_ctypes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two independent readers of the same devices."""
    pytest.importorskip("pyverbs.device", reason="Debian's pyverbs needs Debian's version of Python")
    by_pyverbs, source = verbs.read_limits()
    assert source == "pyverbs"
    monkeypatch.setitem(sys.modules, "pyverbs.device", None)
    by_ctypes, source = verbs.read_limits()
    assert source == "ctypes"
    assert set(by_pyverbs) == set(by_ctypes) == set(RAILS)
    for device, limits in by_pyverbs.items():
        other = by_ctypes[device]
        assert limits.max_inline == 512  # soft-RoCE's, by trying
        assert other.max_inline is None
        for name in ("max_qp", "max_qp_wr", "max_sge", "max_cq", "max_cqe", "max_mr", "max_mr_nbytes"):
            assert getattr(limits, name) == getattr(other, name), name
        assert (limits.max_srq, limits.max_rd_atomic) == (other.max_srq, other.max_rd_atomic)
        assert limits.mtus == other.mtus == {1: verbs.Mtu(4096, 4096)}
        assert limits.max_sge == 32


def test_a_port_that_is_down_is_named_with_its_remedy(rail_down: None) -> None:
    check = found()["port rxea1/1"]
    assert check.state is State.LIMITED  # others work
    assert "the port is DOWN" in check.detail
    assert "ip link set a1 up" in check.advice


def test_a_small_mtu_is_seen(small_mtu: None) -> None:
    check = found()["port rxea1/1"]
    assert check.state is State.LIMITED
    assert "MTU 1024 of 4096 possible" in check.detail
    assert "ip link set a1 mtu 4192 or more" in check.advice
    assert "rxea1/1: MTU 1024, others have more" in found()["rails"].detail


def test_a_link_local_address_alone_reaches_one_segment(lonely: None) -> None:
    check = found()["port rxelonely/1"]
    assert "this Ethernet segment only" in check.detail


def test_two_hosts_compare() -> None:
    facts = rdma.discover().facts
    theirs = {"ports": [port for port in facts["ports"] if port["device"].startswith("rxeb")]}
    checks = {check.name: check for check in rdma.compare(theirs)}
    assert checks["rxea0/1 and peer"].detail == "gets on with rxeb0/1"
    assert checks["rxea1/1 and peer"].detail == "gets on with rxeb1/1"
    del theirs["ports"][1]
    checks = {check.name: check for check in rdma.compare(theirs)}
    assert "is on another subnet than 10.21.0.1/24" in checks["rxea1/1 and peer"].detail


def test_devices_that_the_library_does_not_list() -> None:
    """In a container without its device files: the kernel's list is there, the library's is empty."""
    program = (
        "import aiocomm, anyio\n"
        "async def main():\n"
        "    await aiocomm.connect('unix:///tmp/none', rank=0, size=1, links=['rdma'])\n"
        "anyio.run(main)\n"
    )
    hidden = 'mount -t tmpfs none /dev/infiniband; exec "$0" -c "$1"'
    command = ["unshare", "--mount", "sh", "-c", hidden, sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    for name in (*RAILS, "--device /dev/infiniband", "ibverbs-providers"):
        assert name in done.stderr, done.stderr


def test_locked_memory_limit_of_an_ordinary_user() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
            os.setuid(NOBODY)
            checks = {check.name: check for check in rdma.discover().checks}
            told = f"{checks['locked memory']}\n{checks['device files']}"
        except BaseException as error:
            told = repr(error)
        os.write(writer, told.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    assert "0.0625 MiB" in text
    assert "ulimit -l unlimited" in text

"""RDMA discovery over a made-up /sys and a stand-in for pyverbs; what is said of all that can be wrong."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import ipaddress
import os
import resource
import signal
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
from fakes.adapters import HEADERS, build

from aiocomm.links import Check, State, rdma
from aiocomm.links import _rdma_devices as devices
from aiocomm.links import _rdma_diagnosis as diagnosis
from aiocomm.links import _rdma_probe as probe
from aiocomm.links import _rdma_verbs as verbs
from aiocomm.links._rdma_devices import Gid, GidType, Port

if TYPE_CHECKING:
    from pathlib import Path

LOCAL = "fe80:0000:0000:0000:5054:00ff:fe12:3456"
MAPPED = "0000:0000:0000:0000:0000:ffff:0a14:0001"
OPENED = rdma._opened
EMPTY = "0000:0000:0000:0000:0000:0000:0000:0000"


class Tree:
    """A /sys/class with infiniband and net in it."""

    def __init__(self, root: Path) -> None:
        self.root = root / "infiniband"
        self.net = root / "net"
        self.root.mkdir()

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def port(
        self,
        name: str = "mlx5_0",
        *,
        state: str = "4: ACTIVE",
        layer: str = "Ethernet",
        gids: tuple[tuple[str, str], ...] = (),
        keys: tuple[str, ...] = ("0xffff",),
        mtu: int = 4200,
    ) -> None:
        at = f"{name}/ports/1"
        for file, text in {
            "state": state,
            "phys_state": "5: LinkUp" if state == "4: ACTIVE" else "3: Disabled",
            "rate": "400 Gb/sec (4X NDR)",
            "link_layer": layer,
        }.items():
            self.write(f"{at}/{file}", text)
        for index, (address, kind) in enumerate(gids or ((LOCAL, "IB/RoCE v1"), (MAPPED, "RoCE v2"))):
            self.write(f"{at}/gids/{index}", address)
            self.write(f"{at}/gid_attrs/types/{index}", kind)
            self.write(f"{at}/gid_attrs/ndevs/{index}", "eth7")
        for index, key in enumerate(keys):
            self.write(f"{at}/pkeys/{index}", key)
        self.write(f"{name}/fw_ver", "28.39.1002")
        self.write(f"{name}/node_type", "1: CA")
        self.write(f"{name}/device/numa_node", "1")
        (self.net / "eth7").mkdir(parents=True, exist_ok=True)
        (self.net / "eth7/mtu").write_text(f"{mtu}\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    made = Tree(tmp_path)
    monkeypatch.setattr(rdma, "_DEVICES", made.root)
    monkeypatch.setattr(rdma, "_NODES", tmp_path / "no-such-folder")
    monkeypatch.setattr(rdma, "_limits", lambda: ({}, ""))
    monkeypatch.setattr(rdma, "_opened", list)
    return made


needs_link = pytest.mark.skipif(not HEADERS, reason="the rdma link is not built (apt install libibverbs-dev)")


@pytest.fixture
def simulated(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Two ports, which the verbs library has as well."""
    monkeypatch.setattr(rdma, "_opened", OPENED)
    monkeypatch.setenv("AIOCOMM_LIBIBVERBS", str(build()))
    for name in ("fake0", "fake1"):
        tree.port(name)
    return tree


def found() -> dict[str, Check]:
    return {check.name: check for check in rdma.discover().checks}


def port(**changes: Any) -> Port:
    gid = Gid(1, ipaddress.IPv6Address(MAPPED), GidType.ROCE_V2, "eth7")
    base = Port(
        device="mlx5_0",
        number=1,
        state="ACTIVE",
        physical_state="LinkUp",
        link_layer="Ethernet",
        rate_gbps=400,
        mtu_nbytes=4096,
        max_mtu_nbytes=4096,
        gids=(gid,),
        partitions=(0xFFFF,),
    )
    return dataclasses.replace(base, **changes)


def infiniband(prefix: str = "fe80:0:0:0", **changes: Any) -> Port:
    gid = Gid(0, ipaddress.IPv6Address(f"{prefix}:1:2:3:4"), GidType.INFINIBAND, "")
    return port(link_layer="InfiniBand", gids=(gid,), **changes)


def at(ipv4: str, **changes: Any) -> Port:
    gid = Gid(1, ipaddress.IPv6Address(f"::ffff:{ipv4}"), GidType.ROCE_V2, "eth7")
    return port(gids=(gid,), **changes)


def test_the_kernel_s_tree_is_read(tree: Tree) -> None:
    tree.port(gids=((LOCAL, "IB/RoCE v1"), (LOCAL, "RoCE v2"), (EMPTY, "RoCE v2"), (MAPPED, "RoCE v2")))
    (device,) = devices.read_devices(tree.root)
    (read,) = device.ports
    assert (device.name, device.firmware, device.numa_node) == ("mlx5_0", "28.39.1002", 1)
    assert (read.name, read.state, read.physical_state, read.rate_gbps) == (
        "mlx5_0/1",
        "ACTIVE",
        "LinkUp",
        400,
    )
    assert [(gid.index, gid.type) for gid in read.gids] == [
        (0, GidType.ROCE_V1),
        (1, GidType.ROCE_V2),
        (3, GidType.ROCE_V2),
    ]
    assert read.gids[2].ipv4 == ipaddress.IPv4Address("10.20.0.1")
    assert (read.interface_mtu_nbytes, read.partitions) == (4200, (0xFFFF,))


def test_a_good_port_says_which_address_and_why(tree: Tree) -> None:
    tree.port()
    check = found()["port mlx5_0/1"]
    assert check.state is State.OK
    assert "GID 1 (10.20.0.1: RoCE v2 with an IPv4 address; 1 other(s))" in check.detail
    assert rdma.discover().summary == "the machine has 1 usable port(s)"


def test_no_device(tree: Tree) -> None:
    check = found()["devices"]
    assert check.state is State.FAILED
    assert "rdma link add" in check.advice


def test_a_port_that_is_down(tree: Tree) -> None:
    tree.port(state="1: DOWN")
    check = found()["port mlx5_0/1"]
    assert check.state is State.FAILED
    assert "DOWN (physically Disabled)" in check.detail
    assert "ip link set eth7 up" in check.advice


def test_a_bad_port_beside_a_good_one_only_limits(tree: Tree) -> None:
    tree.port("mlx5_0", state="1: DOWN")
    tree.port("mlx5_1")
    assert found()["port mlx5_0/1"].state is State.LIMITED
    assert found()["port mlx5_1/1"].state is State.OK


def test_no_roce_v2_gid(tree: Tree) -> None:
    tree.port(gids=((LOCAL, "IB/RoCE v1"),))
    check = found()["port mlx5_0/1"]
    assert check.state is State.FAILED
    assert "no RoCE v2 GID (it has RoCE v1)" in check.detail
    assert "give eth7 an IP address" in check.advice


@pytest.mark.parametrize(
    ("addresses", "index", "reason"),
    [
        ((("fe80::1", "2"), ("2001:db8::1", "2"), ("::ffff:10.0.0.1", "2")), 2, "IPv4"),
        ((("fe80::1", "2"), ("2001:db8::1", "2"), ("::ffff:10.0.0.1", "1")), 1, "global IPv6"),
        ((("fe80::1", "2"), ("2001:db8::1", "1")), 0, "this Ethernet segment only"),
        ((("::ffff:10.0.0.1", "2"), ("::ffff:10.0.0.2", "2")), 0, "IPv4"),
        ((("::ffff:10.0.0.1", "1"),), None, "none of its 1 GIDs is RoCE v2"),
    ],
)
def test_choice_of_the_address(addresses: Any, index: int | None, reason: str) -> None:
    kinds = {"1": GidType.ROCE_V1, "2": GidType.ROCE_V2}
    gids = tuple(
        Gid(number, ipaddress.IPv6Address(address), kinds[kind], "eth7")
        for number, (address, kind) in enumerate(addresses)
    )
    choice = diagnosis.choose_gid(port(gids=gids))
    assert (choice.gid.index if choice.gid else None) == index
    assert reason in choice.reason


def test_infiniband_has_one_address() -> None:
    assert diagnosis.choose_gid(infiniband()).gid is not None
    assert diagnosis.choose_gid(port(link_layer="InfiniBand", gids=())).reason == "the port has no GID"
    assert "subnet manager" in diagnosis.port_problems(port(link_layer="InfiniBand", gids=()))[0].remedy


@pytest.mark.parametrize(
    ("broken", "what", "remedy"),
    [
        (port(state="DOWN"), "the port is DOWN", "ip link set eth7 up"),
        (infiniband(state="INIT"), "the port is INIT", "no subnet manager answers"),
        (infiniband(state="DOWN"), "the port is DOWN", "plug the cable in"),
        (port(gids=()), "no RoCE v2 GID (it has none at all)", "IP address"),
        (port(node_type="RNIC", gids=()), "neither InfiniBand nor RoCE (RNIC", "link tcp"),
        (infiniband(partitions=(0x7FFF, 0x0001)), "only a limited member", "partitions.conf"),
        (port(mtu_nbytes=512, interface_mtu_nbytes=1000), "MTU 512", "ip link set eth7 mtu 1120 or more"),
        (port(mtu_nbytes=1024), "MTU 1024 of 4096 possible", "ip link set eth7 mtu 4192 or more"),
        (infiniband(mtu_nbytes=2048), "MTU 2048 of 4096 possible", "the subnet manager sets it"),
    ],
)
def test_what_is_wrong_with_a_port(broken: Port, what: str, remedy: str) -> None:
    (problem,) = diagnosis.port_problems(broken)
    assert problem.port == "mlx5_0/1"
    assert what in problem.what
    assert remedy in problem.remedy
    assert str(problem).startswith("mlx5_0/1: ")
    assert problem.fatal == (not problem.what.startswith(("MTU", "only a limited")))


@pytest.mark.parametrize(
    ("ours", "theirs", "what", "fatal"),
    [
        (port(), port(), "", False),
        (port(), port(mtu_nbytes=1024), "MTU 4096 here, 1024 at the peer (mlx5_0/1)", False),
        (port(), infiniband(), "Ethernet here, InfiniBand at the peer", True),
        (at("10.0.0.1"), at("10.0.1.1"), "(mlx5_0/1) is on another subnet than 10.0.0.1/24", False),
        (at("10.0.0.1"), at("10.0.0.9"), "", False),
        (infiniband(), infiniband("fec0:0:0:1"), "InfiniBand subnet fe80000000000000 here", True),
        (infiniband(), infiniband(partitions=(0x8001,)), "no common partition: 0xffff is used here", True),
        (infiniband(partitions=(0x7FFF,)), infiniband(partitions=(0x7FFF,)), "no common partition", True),
        (infiniband(partitions=(0x7FFF,)), infiniband(), "", False),
        (infiniband(partitions=(0x7FFF, 0x8001)), infiniband(partitions=(0x0001,)), "", False),
        (infiniband(partitions=(0x7FFF, 0x8001)), infiniband(), "no common partition: 0x8001 is used", True),
        (infiniband(partitions=()), infiniband(), "", False),
        (port(gids=(Gid(0, ipaddress.IPv6Address("2001:db8::1"), GidType.ROCE_V2, "e"),)), port(),
         "IPv4 and IPv6 do not meet", True),
    ],
)  # fmt: skip
def test_what_is_wrong_between_two_ports(ours: Port, theirs: Port, what: str, fatal: bool) -> None:
    problems = diagnosis.pair_problems(ours, theirs)
    assert len(problems) == bool(what)
    for problem in problems:
        assert problem.port == ours.name
        assert what in problem.what
        assert problem.remedy
        assert problem.fatal == fatal


@pytest.mark.parametrize(("has", "state"), [(0, State.LIMITED), (1024, State.INFO)])
def test_a_device_without_shared_receive_queues(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, has: int, state: State
) -> None:
    tree.port("irdma0")
    names = [field.name for field in dataclasses.fields(verbs.DeviceLimits)][:10]
    limits = verbs.DeviceLimits(**{**dict.fromkeys(names, 1), "max_srq": has})
    monkeypatch.setattr(rdma, "_limits", lambda: ({"irdma0": limits}, "ctypes"))
    check = found()["device irdma0"]
    assert check.state is state
    assert f"{has:,} shared receive queues" in check.detail
    assert check.advice == ("without the latter the link cannot use it" if not has else "")


def test_rails_of_unequal_mtu() -> None:
    (problem,) = diagnosis.rail_problems([port(), port(device="mlx5_1", mtu_nbytes=1024)])
    assert problem.port == "mlx5_1/1"
    assert "others have more (mlx5_0/1 4096)" in problem.what
    assert not diagnosis.rail_problems([port(), port(device="mlx5_1")])


def test_a_port_survives_json() -> None:
    import json

    original = port()
    assert devices.port_from_json(json.loads(json.dumps(devices.port_to_json(original)))) == original


@pytest.mark.parametrize("plain", [{}, {"gids": [], "partitions": []}, {"gids": [{}], "partitions": []}])
def test_what_is_no_port_is_refused(plain: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not the description of a port"):
        devices.port_from_json(plain)


def test_hosts_are_compared(tree: Tree) -> None:
    tree.port()
    here = rdma.discover().facts
    (same,) = rdma.compare(here)
    assert (same.name, same.state) == ("mlx5_0/1 and peer", State.OK)
    there = [devices.port_to_json(port(link_layer="InfiniBand"))]
    (other,) = rdma.compare({"ports": there})
    assert other.state is State.FAILED
    assert "share no wire" in other.advice
    (both,) = rdma.compare({"ports": [*there, *here["ports"]]})  # the one that suits is chosen
    assert both.state is State.OK
    (none,) = rdma.compare({"ports": []})
    assert none.detail == "no usable port there"
    with pytest.raises(ValueError, match="no ports"):
        rdma.compare({})


@pytest.mark.parametrize(
    ("limit", "capabilities", "state", "text"),
    [
        (8 << 20, 0, State.LIMITED, "8 MiB (hard limit 8 MiB)"),
        (8 << 20, 1 << 14, State.OK, "CAP_IPC_LOCK"),
        (resource.RLIM_INFINITY, 0, State.OK, "unlimited"),
    ],
)
def test_locked_memory(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, limit: int, capabilities: int, state: State, text: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    (status := tree.root.parent / "status").write_text(f"Name:\tx\nCapEff:\t{capabilities:016x}\n")
    monkeypatch.setattr(rdma, "_STATUS", status)
    check = found()["locked memory"]
    assert check.state is state
    assert text in check.detail
    assert ("ulimit -l" in check.advice) == (state is State.LIMITED)


class Closing:
    """What pyverbs' objects have in common."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def stand_in(monkeypatch: pytest.MonkeyPatch, inline: int) -> None:
    """A pyverbs with one device, whose queue pairs take `inline` bytes inline."""

    class Refused(Exception):
        pass

    class Context(Closing):
        def query_device(self) -> Any:
            names = (field.name for field in dataclasses.fields(verbs.DeviceLimits))
            numbers = {name: 7 for name in names}
            return types.SimpleNamespace(**numbers, max_mr_size=1 << 40, max_qp_rd_atom=128, phys_port_cnt=1)

        def query_port(self, number: int) -> Any:
            return types.SimpleNamespace(active_mtu=3, max_mtu=5)

    class QP(Closing):
        def __init__(self, domain: Any, attributes: Any) -> None:
            if attributes.cap.max_inline_data > inline:
                raise Refused("inline")

    def attributes(**given: Any) -> Any:
        return types.SimpleNamespace(**given)

    modules: dict[str, dict[str, Any]] = {
        "pyverbs": {},
        "pyverbs.device": {
            "get_device_list": lambda: [types.SimpleNamespace(name=b"mlx5_0")],
            "Context": Context,
            "PyverbsError": Refused,
        },
        "pyverbs.cq": {"CQ": Closing},
        "pyverbs.pd": {"PD": Closing},
        "pyverbs.enums": {"IBV_QPT_RC": 2},
        "pyverbs.qp": {"QP": QP, "QPCap": attributes, "QPInitAttr": attributes},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


@pytest.mark.parametrize("inline", [512, 0])
def test_limits_by_pyverbs(monkeypatch: pytest.MonkeyPatch, tree: Tree, inline: int) -> None:
    stand_in(monkeypatch, inline)
    limits, source = verbs.read_limits()
    assert source == "pyverbs"
    assert limits["mlx5_0"].max_inline == inline
    assert (limits["mlx5_0"].max_qp, limits["mlx5_0"].max_mr_nbytes) == (7, 1 << 40)
    assert limits["mlx5_0"].mtus == {1: verbs.Mtu(1024, 4096)}
    tree.port()
    monkeypatch.setattr(rdma, "_limits", lambda: (limits, source))
    assert f"inline {inline} B, NUMA node 1" in found()["device mlx5_0"].detail
    assert "MTU 1024 of 4096" in found()["port mlx5_0/1"].detail
    assert found()["packages"].detail.startswith("pyverbs")


def test_neither_pyverbs_nor_library(monkeypatch: pytest.MonkeyPatch, tree: Tree) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no such file")

    monkeypatch.setitem(sys.modules, "pyverbs", None)
    monkeypatch.setitem(sys.modules, "pyverbs.device", None)
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(verbs.Unavailable, match="no such file"):
        verbs.read_limits()
    tree.port()
    assert found()["verbs library"].state is State.FAILED
    assert found()["device mlx5_0"].detail == "limits unknown, NUMA node 1"


def test_device_files_without_access(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    tree.port()
    (nodes := tree.root.parent / "nodes").mkdir()
    (nodes / "uverbs0").touch()
    monkeypatch.setattr(rdma, "_NODES", nodes)
    assert found()["device files"].state is State.OK
    monkeypatch.setattr(os, "access", lambda *_: False)
    check = found()["device files"]
    assert check.state is State.FAILED
    assert "uverbs0" in check.detail
    assert "--device /dev/infiniband" in check.advice


@needs_link
def test_a_device_that_the_link_does_without_is_told(
    simulated: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found()["opening"] == Check("opening", State.OK, "no device is left out")
    monkeypatch.setenv("FAKE_VERBS_LACKS", f"0:create_cq:{errno.ENOMEM}")
    told = found()
    assert "opening" not in told
    assert told["without fake0:1"].state is State.LIMITED
    assert "device fake0" in told["without fake0:1"].detail
    assert os.strerror(errno.ENOMEM) in told["without fake0:1"].detail
    assert "other hosts" in told["without fake0:1"].advice
    assert rdma.discover().usable
    monkeypatch.setenv("AIOCOMM_RDMA_DEVICES", "fake0")  # nothing is left
    told = found()
    assert told["opening"].state is State.FAILED
    assert told["opening"].detail.startswith("rdma: device fake0 port 1: ")
    assert os.strerror(errno.ENOMEM) in told["opening"].detail
    assert not rdma.discover().usable


@needs_link
@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("AIOCOMM_RDMA_DEVICES", "fake0,mlx5_9", "names mlx5_9, which this machine does not have"),
        ("AIOCOMM_RDMA_GID_INDEX", "200", "no address at GID index 200"),
        ("AIOCOMM_RDMA_RETRY_S", "soon", "AIOCOMM_RDMA_RETRY_S"),
    ],
)
def test_settings_with_which_the_link_cannot_be_opened_are_told(
    variable: str, value: str, why: str, simulated: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert found()["opening"].state is State.FAILED
    assert why in found()["opening"].detail


def test_a_probe_that_gives_no_answer_is_told(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(text: str) -> None:
        monkeypatch.setattr(probe, "_COMMAND", [sys.executable, "-c", text])

    child("import os; os.abort()")
    with pytest.raises(OSError, match=f"ended by -{signal.SIGABRT:d}"):
        probe.left_out()
    child("import signal; signal.pause()")
    monkeypatch.setattr(probe, "_TIMEOUT_S", 0.1)
    with pytest.raises(OSError, match="no answer within"):
        probe.left_out()

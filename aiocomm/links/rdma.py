"""RDMA: what this machine has for the verbs link. Whether this build carries the link is asked of it."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiocomm.config import device_nodes, driver_library
from aiocomm.link import LEFT_OUT
from aiocomm.links import _rdma_devices as devices
from aiocomm.links import _rdma_diagnosis as diagnosis
from aiocomm.links import _rdma_gpu as gpus
from aiocomm.links import _rdma_probe as probe
from aiocomm.links import _rdma_verbs as verbs
from aiocomm.links._capabilities import Capabilities
from aiocomm.links._cuda_driver import CudaError, NoDriver, device, open_driver
from aiocomm.links._report import Check, Report, State, is_built, package_version, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aiocomm.links._cuda_driver import Device as Gpu
    from aiocomm.links._cuda_driver import Driver
    from aiocomm.links._rdma_devices import Device, Port
    from aiocomm.links._rdma_diagnosis import Problem

__all__ = ["CAPABILITIES", "compare", "discover"]

CAPABILITIES = Capabilities(
    reach="hosts on InfiniBand or RoCE",
    memory="host; GPU by dma-buf or nvidia_peermem (never run on such hardware), else through the host",
    paths="eager, read, write",
    wake="a completion channel, and its poller's thread",
    loss="the pair's connection, or three missing heartbeats",
    encryption="none: RDMA has none; keep it to a network of its own",
)

_DEVICES, _NODES = devices.DEVICES, Path("/dev/infiniband")
_PCI: Final = Path("/sys/bus/pci/devices")
_DMA_BUF_SUPPORTED: Final = 124  # CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED
_STATUS: Final = Path("/proc/self/status")
_CAP_IPC_LOCK: Final = 1 << 14
_SMALL_MEMLOCK: Final = 1 << 30


def discover() -> Report:
    """Look for the verbs library, devices, ports, addresses and limits, access to them, and locked memory."""
    limits, source = _limits()
    nodes = device_nodes()
    found = [
        dataclasses.replace(one, numa_node=nodes.get(one.name, one.numa_node))
        for one in devices.read_devices(_DEVICES, limits)
    ]
    ports = [port for one in found for port in one.ports]
    library = _library()
    checks = [*_build(), library, *_no_devices(found)]
    for one in found:
        checks += [_device(one, source), *(_port(port) for port in one.ports)]
    checks += [*_rails(ports), *_gpus(found)]
    checks += [_access(), _memlock(), _pyverbs(source)]
    active = sum(_works(port) for port in ports)
    if active and library.state is State.OK and is_built("rdma"):
        checks += _opened()
    machine = f"the machine has {active} usable port(s)" if active else "the machine has no usable port"
    facts = {"ports": [devices.port_to_json(port) for port in ports]}
    return Report("rdma", is_built("rdma"), machine, tuple(_one_port_is_enough(checks, active)), facts)


def compare(theirs: Mapping[str, Any]) -> list[Check]:
    """Compare this machine's ports with those of another, from the `facts` of its report.

    Each port here is compared with the one there that suits it best.

    Raises:
        ValueError: These are not such facts.
    """
    if not isinstance(theirs.get("ports"), list):
        raise ValueError("no ports among the facts")
    limits, _ = _limits()
    peers = [port for plain in theirs["ports"] if _works(port := devices.port_from_json(plain))]
    ours = [p for device in devices.read_devices(_DEVICES, limits) for p in device.ports if _works(p)]
    if not ours or not peers:
        return [
            Check("peer", State.FAILED, f"no usable port {'there' if ours else 'here'}", "see its doctor")
        ]
    return [_compared(port, peers) for port in ours]


def _compared(port: Port, peers: Sequence[Port]) -> Check:
    def badness(peer: Port) -> tuple[int, int]:
        problems = diagnosis.pair_problems(port, peer)
        return sum(problem.fatal for problem in problems), len(problems)

    peer = min(peers, key=badness)
    problems = diagnosis.pair_problems(port, peer)
    detail = "; ".join(problem.what for problem in problems) or f"gets on with {peer.name}"
    return Check(f"{port.name} and peer", _state(problems), detail, _remedies(problems))


def _limits() -> tuple[dict[str, verbs.DeviceLimits], str]:
    try:
        return verbs.read_limits()
    except verbs.Unavailable:
        return {}, ""


def _build() -> list[Check]:
    if is_built("rdma"):
        return []
    why, remedy = LEFT_OUT["rdma"]
    return [Check("this build", State.FAILED, f"has no rdma link: {why}", remedy)]


def _library() -> Check:
    try:
        ctypes.CDLL(verbs.library())
    except OSError:
        advice = "install rdma-core (Debian, Ubuntu: apt install libibverbs1 ibverbs-providers)"
        return Check("verbs library", State.FAILED, f"{verbs.library()} does not load", advice)
    return Check("verbs library", State.OK, verbs.library())


def _no_devices(found: Sequence[Device]) -> list[Check]:
    if found:
        return []
    advice = "soft-RoCE serves for trying: rdma link add rxe0 type rxe netdev eth0 (kernel module rdma_rxe)"
    return [Check("devices", State.FAILED, f"none in {_DEVICES}", advice)]


def _device(device: Device, source: str) -> Check:
    where = "" if device.numa_node is None else f", NUMA node {device.numa_node}"
    if device.limits is None:
        advice = "it could not be opened: see device files below" if source else ""
        return Check(
            f"device {device.name}",
            State.LIMITED if source else State.INFO,
            f"limits unknown{where}",
            advice,
        )
    has = device.limits
    inline = "unknown without pyverbs" if has.max_inline is None else f"{has.max_inline} B"
    detail = (
        f"{has.max_qp:,} queue pairs of {has.max_qp_wr:,} requests and {has.max_sge} segments, "
        f"{has.max_cq:,} completion queues, {has.max_mr:,} regions up to "
        f"{has.max_mr_nbytes / 2**30:,.0f} GiB, {has.max_rd_atomic} reads open, inline {inline}{where}, "
        f"{has.max_srq:,} shared receive queues"
    )
    if not has.max_srq:
        return Check(
            f"device {device.name}", State.LIMITED, detail, "without the latter the link cannot use it"
        )
    return Check(f"device {device.name}", State.INFO, detail)


def _port(port: Port) -> Check:
    choice = diagnosis.choose_gid(port)
    facts = [port.state, port.link_layer]
    facts += [f"{port.rate_gbps:g} Gb/s"] if port.rate_gbps else []
    facts += [f"MTU {port.mtu_nbytes} of {port.max_mtu_nbytes}"] if port.mtu_nbytes else []
    if choice.gid is not None:
        address = choice.gid.ipv4 or choice.gid.address
        others = len(port.gids) - 1
        facts.append(f"GID {choice.gid.index} ({address}: {choice.reason}; {others} other(s))")
    problems = diagnosis.port_problems(port)
    detail = ", ".join(facts) + "".join(f"; {problem.what}" for problem in problems)
    return Check(f"port {port.name}", _state(problems), detail, _remedies(problems))


def _opened() -> list[Check]:
    """What the link itself says when it opens the devices."""
    try:
        left_out = probe.left_out()
    except OSError as error:
        return [Check("opening", State.FAILED, str(error))]
    if not left_out:
        return [Check("opening", State.OK, "no device is left out")]
    advice = (
        "where it stays so, leave it out on other hosts, too (AIOCOMM_RDMA_DEVICES): rails pair up by order"
    )
    return [Check(f"without {name}", State.LIMITED, reason, advice) for name, reason in left_out]


def _rails(ports: Sequence[Port]) -> list[Check]:
    problems = diagnosis.rail_problems([port for port in ports if _works(port)])
    return [Check("rails", State.LIMITED, str(problem), problem.remedy) for problem in problems]


def _gpus(found: Sequence[Device]) -> list[Check]:
    """Which device is nearest to each GPU, and by what way it could reach its memory."""
    try:
        driver = open_driver(driver_library())
        driver.start()
        seen = [(device(driver, index), _exports(driver, index)) for index in range(driver.count())]
    except (NoDriver, CudaError):
        return []  # the cuda link's report says why
    places = {
        one.name: dataclasses.replace(gpus.read_place(_DEVICES / one.name / "device"), node=one.numa_node)
        for one in found
    }
    return [_gpu(gpu, exports, places) for gpu, exports in seen] if places else []


def _exports(driver: Driver, index: int) -> bool:
    try:
        return bool(driver.attribute(_DMA_BUF_SUPPORTED, index))
    except CudaError:
        return False  # of a driver that does not know the question


def _gpu(gpu: Gpu, exports: bool, places: Mapping[str, gpus.Place]) -> Check:
    order = gpus.nearest_first(gpus.read_place(_PCI / f"{gpu.pci}.0"), places)
    near = ", ".join(f"{name} {between}" for name, between in order)
    reach = gpus.Reach(
        exports=exports,
        registers=_has_dma_buf(),
        takes=any(place.bridges for place in places.values()),
        peer_memory=any(path.exists() for path in gpus.PEER_MEMORY),
    )
    way, why = gpus.choose_way(reach)
    reached = "adapters do not reach its memory" if way is gpus.Way.HOST else f"adapters reach it by {way}"
    return Check(f"GPU {gpu.index}", State.INFO, f"nearest first: {near}; {reached} ({why})")


def _has_dma_buf() -> bool:
    try:
        return hasattr(ctypes.CDLL(verbs.library()), "ibv_reg_dmabuf_mr")
    except OSError:
        return False


def _works(port: Port) -> bool:
    return not any(problem.fatal for problem in diagnosis.port_problems(port))


def _one_port_is_enough(checks: Sequence[Check], active: int) -> list[Check]:
    """A broken port beside a good one limits the link, it does not stop it."""
    return [
        Check(check.name, State.LIMITED, check.detail, check.advice)
        if active and check.state is State.FAILED and check.name.startswith("port ")
        else check
        for check in checks
    ]


def _state(problems: Sequence[Problem]) -> State:
    if any(problem.fatal for problem in problems):
        return State.FAILED
    return State.LIMITED if problems else State.OK


def _remedies(problems: Sequence[Problem]) -> str:
    return "\n".join(problem.remedy for problem in problems)


def _access() -> Check:
    nodes = sorted(_NODES.glob("uverbs*"))
    if not nodes:
        return Check("device files", State.INFO, f"no {_NODES}/uverbs*")
    refused = [str(node) for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if refused:
        advice = "give this user read and write access; in a container: --device /dev/infiniband"
        return Check("device files", State.FAILED, f"no access to {', '.join(refused)}", advice)
    return Check("device files", State.OK, f"{len(nodes)} accessible")


def _memlock() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("locked memory", State.OK, "unlimited")
    if _may_lock():
        return Check("locked memory", State.OK, f"{_mebibytes(soft)}, which CAP_IPC_LOCK overrides")
    advice = (
        "registered memory is locked: ulimit -l unlimited, memlock in /etc/security/limits.conf, "
        "LimitMEMLOCK=infinity in a unit, --ulimit memlock=-1 for a container"
    )
    state = State.LIMITED if soft < _SMALL_MEMLOCK else State.OK
    detail = f"{_mebibytes(soft)} (hard limit {_mebibytes(hard)}): no more can be registered at a time"
    return Check("locked memory", state, detail, advice if state is State.LIMITED else "")


def _mebibytes(nbytes: int) -> str:
    return "unlimited" if nbytes == resource.RLIM_INFINITY else f"{nbytes / 2**20:g} MiB"


def _may_lock() -> bool:
    for line in (read_text(_STATUS) or "").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & _CAP_IPC_LOCK)
    return False


def _pyverbs(source: str) -> Check:
    if source == "pyverbs":
        version = package_version("pyverbs")
        return Check("packages", State.INFO, f"pyverbs {version}" if version else "pyverbs of the system")
    read = ": limits and MTU are read by ctypes" if source else ""
    advice = "Debian's python3-pyverbs with the system's Python, or pip install 'aiocomm[rdma]'"
    return Check("packages", State.INFO, f"no pyverbs{read}", advice)

"""What only an opened device tells: limits and MTU. By pyverbs where it can be imported, else by ctypes.

Both open each device for a moment and close it again. Nothing here is on the data path.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from aiocomm.config import verbs_library

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["DeviceLimits", "Mtu", "Unavailable", "library", "read_limits"]

_LIBRARY: Final = "libibverbs.so.1"
_MTU_CODES: Final = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}
_INLINE_TRIED: Final = (4096, 2048, 1024, 512, 256, 128, 64)


class Unavailable(Exception):
    """Neither pyverbs nor the library can be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Mtu:
    """Largest payload of a packet, in bytes: as negotiated, and as the port could."""

    active_nbytes: int | None
    max_nbytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLimits:
    """What a device allows. `max_inline` is None where it was not tried: only a queue pair tells it."""

    max_qp: int
    max_qp_wr: int
    max_sge: int
    max_cq: int
    max_cqe: int
    max_mr: int
    max_mr_nbytes: int
    max_srq: int
    max_srq_wr: int
    max_rd_atomic: int
    """RDMA reads that a queue pair may have outstanding at the side that is read from."""
    max_inline: int | None = None
    mtus: Mapping[int, Mtu] = field(default_factory=dict)
    """By port number."""


def library() -> str:
    """Name or path of the verbs library that the link loads."""
    return verbs_library() or _LIBRARY


def read_limits() -> tuple[dict[str, DeviceLimits], str]:
    """Ask every device. Returns limits by device, and by what they were read.

    Devices that refuse to be opened are left out.

    Raises:
        Unavailable: There is neither pyverbs nor the verbs library.
    """
    try:
        import pyverbs.device as pyverbs_device
    except ImportError:
        return _by_ctypes(), "ctypes"
    return _by_pyverbs(pyverbs_device), "pyverbs"


def _by_pyverbs(module: Any) -> dict[str, DeviceLimits]:
    found = {}
    for device in module.get_device_list():
        name = device.name.decode() if isinstance(device.name, bytes) else device.name
        with contextlib.suppress(module.PyverbsError), module.Context(name=name) as context:
            attributes = context.query_device()
            mtus = {}
            for number in range(1, attributes.phys_port_cnt + 1):
                port = context.query_port(number)
                mtus[number] = Mtu(_MTU_CODES.get(port.active_mtu), _MTU_CODES.get(port.max_mtu))
            found[name] = _limits(attributes, mtus, _inline_of(context, module.PyverbsError))
    return found


def _limits(attributes: Any, mtus: dict[int, Mtu], inline: int | None) -> DeviceLimits:
    """From the fields of `ibv_device_attr`, which both ways call alike."""
    return DeviceLimits(
        max_qp=attributes.max_qp,
        max_qp_wr=attributes.max_qp_wr,
        max_sge=attributes.max_sge,
        max_cq=attributes.max_cq,
        max_cqe=attributes.max_cqe,
        max_mr=attributes.max_mr,
        max_mr_nbytes=attributes.max_mr_size,
        max_srq=attributes.max_srq,
        max_srq_wr=attributes.max_srq_wr,
        max_rd_atomic=attributes.max_qp_rd_atom,
        max_inline=inline,
        mtus=mtus,
    )


def _inline_of(context: Any, refused: type[Exception]) -> int | None:
    """The largest inline size with which a queue pair can be made: no device tells it otherwise."""
    try:
        from pyverbs.cq import CQ
        from pyverbs.enums import IBV_QPT_RC
        from pyverbs.pd import PD
        from pyverbs.qp import QP, QPCap, QPInitAttr
    except ImportError:
        return None
    with contextlib.suppress(refused), PD(context) as domain, CQ(context, 1) as queue:
        for nbytes in _INLINE_TRIED:
            capacity = QPCap(max_send_wr=1, max_recv_wr=1, max_inline_data=nbytes)
            wanted = QPInitAttr(qp_type=IBV_QPT_RC, scq=queue, rcq=queue, cap=capacity)
            with contextlib.suppress(refused), QP(domain, wanted):
                return nbytes
        return 0
    return None


def _ints(names: str) -> list[tuple[str, type[ctypes.c_int]]]:
    return [(name, ctypes.c_int) for name in names.split()]


# The ABI of libibverbs since 1.1, as in infiniband/verbs.h.
class _DeviceAttributes(ctypes.Structure):
    _fields_ = (
        ("fw_ver", ctypes.c_char * 64),
        ("node_guid", ctypes.c_uint64),
        ("sys_image_guid", ctypes.c_uint64),
        ("max_mr_size", ctypes.c_uint64),
        ("page_size_cap", ctypes.c_uint64),
        ("vendor_id", ctypes.c_uint32),
        ("vendor_part_id", ctypes.c_uint32),
        ("hw_ver", ctypes.c_uint32),
        *_ints("max_qp max_qp_wr device_cap_flags max_sge max_sge_rd max_cq max_cqe max_mr max_pd"),
        *_ints("max_qp_rd_atom max_ee_rd_atom max_res_rd_atom max_qp_init_rd_atom max_ee_init_rd_atom"),
        *_ints("atomic_cap max_ee max_rdd max_mw max_raw_ipv6_qp max_raw_ethy_qp max_mcast_grp"),
        *_ints("max_mcast_qp_attach max_total_mcast_qp_attach max_ah max_fmr max_map_per_fmr"),
        *_ints("max_srq max_srq_wr max_srq_sge"),
        ("max_pkeys", ctypes.c_uint16),
        ("local_ca_ack_delay", ctypes.c_uint8),
        ("phys_port_cnt", ctypes.c_uint8),
    )


class _PortAttributes(ctypes.Structure):
    _fields_ = (
        *_ints("state max_mtu active_mtu gid_tbl_len"),
        ("rest", ctypes.c_uint8 * 64),  # more than any version of the library writes
    )


def _by_ctypes() -> dict[str, DeviceLimits]:
    try:
        verbs = ctypes.CDLL(library())
    except OSError as error:
        raise Unavailable(f"no pyverbs, and {library()} does not load ({error})") from error
    verbs.ibv_get_device_list.restype = ctypes.POINTER(ctypes.c_void_p)
    verbs.ibv_get_device_name.restype = ctypes.c_char_p
    verbs.ibv_open_device.restype = ctypes.c_void_p
    for name in ("ibv_get_device_name", "ibv_open_device", "ibv_close_device"):
        getattr(verbs, name).argtypes = [ctypes.c_void_p]
    verbs.ibv_query_device.argtypes = [ctypes.c_void_p, ctypes.POINTER(_DeviceAttributes)]
    verbs.ibv_query_port.argtypes = [ctypes.c_void_p, ctypes.c_uint8, ctypes.POINTER(_PortAttributes)]
    found = {}
    for name, context in _opened(verbs):
        attributes = _DeviceAttributes()
        if verbs.ibv_query_device(context, ctypes.byref(attributes)):
            continue
        mtus = {}
        for number in range(1, attributes.phys_port_cnt + 1):
            port = _PortAttributes()
            if not verbs.ibv_query_port(context, number, ctypes.byref(port)):
                mtus[number] = Mtu(_MTU_CODES.get(port.active_mtu), _MTU_CODES.get(port.max_mtu))
        found[name] = _limits(attributes, mtus, None)
    return found


def _opened(verbs: ctypes.CDLL) -> Iterator[tuple[str, int]]:
    """Each device that can be opened, while it is open."""
    count = ctypes.c_int()
    devices = verbs.ibv_get_device_list(ctypes.byref(count))
    if not devices:
        return
    try:
        for index in range(count.value):
            context = verbs.ibv_open_device(devices[index])
            if context:
                try:
                    yield verbs.ibv_get_device_name(devices[index]).decode(), context
                finally:
                    verbs.ibv_close_device(context)
    finally:
        verbs.ibv_free_device_list(devices)

"""Settings. The only module that reads the environment.

Every setting is a field of `Settings`; `AIOCOMM_` and its name in capitals is the variable that sets it.
Sizes take suffixes (`64KiB`, `4M`, both binary), times too (`20us`, `1.5ms`, `2s`); without one they are
bytes and seconds.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiocomm._variables import check, read, unknown, variable
from aiocomm._world import World, detect, own_host
from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Settings",
    "World",
    "child_environment",
    "driver_library",
    "environment_world",
    "resolve_world",
    "take_worker",
    "unknown_variables",
    "variable",
    "verbs_library",
]

KIB: Final = 1024
MIB: Final = 1024 * KIB

_AGES_S: Final = 1e9  # 30 years; in nanoseconds it still fits 64 bits, with room to add
_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_NO_SETTINGS: Final = (  # and yet read
    "address", "rank", "size", "local_rank", "port", "name", "token", "token_file", "worker", "libcuda"
)  # fmt: skip


def _setting(default: Any, unit: str, doc: str, **checks: Any) -> Any:
    return field(default=default, metadata={"unit": unit, "doc": doc, **checks})


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _gpu_spin() -> float:
    return 200e-6 if _cores() >= 8 else 0.0  # where cores are short, a spinner only delays the others


def _copy_threads() -> int:
    return max(min(2, _cores()), min(4, _cores() // 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set at run time, with its default."""

    eager_max: int = _setting(
        64 * KIB, "bytes", "Larger messages are sent by rendezvous.", low=0, high=1 << 30
    )
    ring_bytes: int = _setting(MIB, "bytes", "Ring of each direction of a pair.", low=64 * KIB, high=1 << 30)
    unexpected_bytes: int = _setting(
        16 * MIB,
        "bytes",
        "Payload held for messages of one peer that nobody has asked for.",
        low=0,
        high=1 << 40,
    )
    queue_depth: int = _setting(
        65536,
        "operations",
        "Submission queue of a link executor; with as many under way, `send_nowait` takes no large message.",
        low=16,
        high=1 << 24,
    )
    copy_threads: int = field(
        default_factory=_copy_threads,
        metadata={
            "unit": "threads",
            "doc": "Threads that copy host memory; at most the cores.",
            "low": 1,
            "high": 64,
        },
    )
    preempt_s: float = _setting(
        100e-6,
        "seconds",
        "The longest that the most urgent channel waits behind posted chunks.",
        low=1e-6,
        high=10.0,
    )
    drain_timeout_s: float = _setting(
        2.0,
        "seconds",
        "How long a cancelled transfer may hold its buffer before its peer is given up as lost.",
        low=0.0,
        high=_AGES_S,
    )
    min_share: float = _setting(
        0.05, "fraction", "Share of a link kept for lower classes.", low=0.0, high=0.5
    )
    engine_spin_s: float = _setting(
        20e-6, "seconds", "How long the engine's thread polls before it sleeps.", low=0.0, high=1.0
    )
    gpu_spin_s: float = field(
        default_factory=_gpu_spin,
        metadata={
            "unit": "seconds",
            "doc": "How long a GPU's copy thread polls after it was active, before it sleeps.",
            "low": 0.0,
            "high": 1.0,
        },
    )
    gpu_mappings: int = _setting(
        1024, "mappings", "GPU allocations of peers that are kept mapped.", low=1, high=1 << 20
    )
    pinned_bytes: int = _setting(
        1 << 30, "bytes", "Pinned host memory for staging GPU memory, kept once taken.", low=0, high=1 << 40
    )
    gpu_pinned_bytes: int = _setting(
        16 << 30,
        "bytes",
        "Arrays of `aiocomm.empty()` of other processes of the host that are pinned here, so that GPUs copy "
        "from and to them directly; beyond it messages are staged.",
        low=0,
        high=1 << 44,
    )
    gpu_relay_bytes: int = _setting(
        1 << 30,
        "bytes",
        "Memory of each GPU for messages whose memory cannot be shared between processes, kept once taken.",
        low=0,
        high=1 << 40,
    )
    chunk_max: int = _setting(4 * MIB, "bytes", "Largest piece of a transfer.", low=4 * KIB, high=1 << 30)
    tcp_streams: int = _setting(
        2,
        "connections",
        "Connections per peer for bulk, besides three: for small messages and control, to wake the peer's "
        "engine, and for payloads of channels of priority high and urgent.",
        low=1,
        high=16,
    )
    tcp_splice: str = _setting(
        "auto",
        "",
        "Send large payloads from the caller's pages instead of copying them: auto, within a host while the "
        "two ends run on different cores and the message is no larger than 128 MiB; on; off.",
        choices=("auto", "on", "off"),
    )
    heartbeat_s: float = _setting(
        1.0,
        "seconds",
        "Between signs of life across hosts; three missing ones are a death.",
        low=0.01,
        high=3600.0,
    )
    cma: str = _setting(
        "auto",
        "",
        "Cross-memory attach: auto, where the kernel allows it; allow, which also lets processes of the same "
        "user trace this one where ptrace_scope is 1; off.",
        choices=("auto", "allow", "off"),
    )
    rdma_devices: str | None = _setting(
        None,
        "names",
        "Ports of RDMA devices to use as rails, by comma, in the same order on all hosts: `mlx5_0:1`, or "
        "`mlx5_0` for all ports of a device; else all that are up. At most 4 may be named, and all must be "
        "there; of more ports the first 4 are used.",
        most=4,
    )
    rdma_nodes: str | None = _setting(
        None,
        "",
        "NUMA nodes of RDMA devices, by comma (`mlx5_0=0,mlx5_1=1`), where the machine does not tell: many "
        "virtual ones do not.",
        pattern=r"[^=,:\s]+=\d{1,4}(,[^=,:\s]+=\d{1,4})*",
        example="mlx5_0=0,mlx5_1=1",
    )
    rdma_gid_index: int = _setting(
        -1,
        "index",
        "GID of the ports; -1: RoCE v2 by the interface's IPv4 address, else by its IPv6 address.",
        low=-1,
        high=255,
    )
    rdma_retry_s: float = _setting(
        2.0,
        "seconds",
        "The longest that an RDMA device tries to reach a peer before its rail is given up; rounded down to "
        "what devices can be told.",
        low=1e-3,
        high=600.0,
    )
    rdma_traffic_class: str = _setting(
        "0",
        "",
        "Traffic class (RoCE: DSCP and ECN bits) of large transfers; or four by comma, for channels of "
        "priority low, normal, high, urgent.",
        each=255,
    )
    rdma_urgent_traffic_class: int = _setting(
        0, "", "Traffic class of small messages and of control.", low=0, high=255
    )
    rdma_service_level: str = _setting(
        "0",
        "",
        "Service level (InfiniBand; RoCE: priority) of large transfers; or four by comma, as for the traffic "
        "class.",
        each=15,
    )
    rdma_urgent_service_level: int = _setting(
        0, "", "Service level of small messages and of control.", low=0, high=15
    )
    rdma_cache_bytes: int = _setting(
        1024 * MIB, "bytes", "Memory kept registered with RDMA devices after its use.", low=0, high=1 << 50
    )
    libibverbs: str | None = _setting(None, "path", "The verbs library; else libibverbs.so.1.")
    links: tuple[str, ...] | None = _setting(None, "names", "Links that may be used, best first, by comma.")
    link_fallback: str = _setting(
        "on",
        "",
        "A pair whose link has failed is connected again with its next operation: on, over the next link "
        "that both ends have; off, over that link only.",
        choices=("on", "off"),
    )
    pair_idle_s: float = _setting(
        0.0,
        "seconds",
        "A connection with a peer that has not been used for so long is closed until it is needed; 0: never.",
        low=0.0,
        high=_AGES_S,
    )
    handshake_timeout_s: float = _setting(
        5.0,
        "seconds",
        "How long a connection may take for each step of authenticating and of being put to use.",
        low=0.01,
        high=600.0,
    )
    max_pending: int = _setting(
        128, "connections", "Connections not yet authenticated, per listening socket.", low=1, high=65536
    )
    timeout_s: float = _setting(
        60.0, "seconds", "How long joining the world may take.", low=0.001, high=_AGES_S
    )
    host: str | None = _setting(None, "", "Address of this host to tell the others; else its own.")
    tls_cert: str | None = _setting(
        None, "path", "Certificate chain (PEM); turns on TLS for TCP connections."
    )
    tls_key: str | None = _setting(None, "path", "Key of `tls_cert` (PEM); else it is in the same file.")
    tls_ca: str | None = _setting(
        None, "path", "Authorities (PEM) whose peers are accepted; needed with TLS."
    )
    log_level: str = _setting("WARNING", "", "Least severe message that is logged.", choices=_LEVELS)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            check(item.name, getattr(self, item.name), item.metadata)
        if self.host is not None:
            object.__setattr__(self, "host", own_host(self.host))
        object.__setattr__(self, "copy_threads", min(self.copy_threads, _cores()))
        if (self.tls_cert is None) != (self.tls_ca is None):
            raise UsageError(
                "TLS needs both AIOCOMM_TLS_CERT and AIOCOMM_TLS_CA: both ends show a certificate"
            )
        if self.tls_key is not None and self.tls_cert is None:
            raise UsageError("AIOCOMM_TLS_KEY is set without AIOCOMM_TLS_CERT")

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> Settings:
        """The settings of `AIOCOMM_*` variables, defaults elsewhere.

        Raises:
            UsageError: a variable does not hold what its setting needs.
        """
        env = os.environ if env is None else env
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            text = env.get(variable(item.name))
            if text:
                values[item.name] = read(item.name, str(item.type), item.metadata["unit"], text)
        return cls(**values)

    def native(self) -> dict[str, int | float | str]:
        """What the native engine takes."""
        names = (
            "eager_max",
            "ring_bytes",
            "unexpected_bytes",
            "queue_depth",
            "copy_threads",
            "preempt_s",
            "drain_timeout_s",
            "min_share",
            "engine_spin_s",
            "tcp_streams",
            "heartbeat_s",
            "pair_idle_s",
            "chunk_max",
            "gpu_spin_s",
            "gpu_mappings",
            "pinned_bytes",
            "gpu_pinned_bytes",
            "gpu_relay_bytes",
            "cma",
            "rdma_gid_index",
            "rdma_cache_bytes",
            "rdma_retry_s",
            "rdma_traffic_class",
            "rdma_urgent_traffic_class",
            "rdma_service_level",
            "rdma_urgent_service_level",
            "tcp_splice",
        )
        return {name: getattr(self, name) for name in names} | {"cores": _cores()}

    def native_arguments(self) -> tuple[dict[str, float], dict[str, str]]:
        """The same, with names and paths where there are any, by kind: numbers, and texts."""
        native = self.native()
        texts = {key: value for key, value in native.items() if isinstance(value, str)}
        for key in ("tls_cert", "tls_key", "tls_ca", "rdma_devices", "rdma_nodes", "libibverbs"):
            if (value := getattr(self, key)) is not None:
                texts[key] = value
        return {key: float(value) for key, value in native.items() if not isinstance(value, str)}, texts

    @classmethod
    def reference(cls) -> list[tuple[str, str, str, str]]:
        """One row per setting: variable, default, unit, meaning."""
        default = cls()
        return [
            (
                variable(item.name),
                str(getattr(default, item.name)),
                item.metadata["unit"],
                item.metadata["doc"],
            )
            for item in dataclasses.fields(cls)
        ]


def unknown_variables(env: Mapping[str, str] | None = None) -> list[tuple[str, str | None]]:
    """Variables `AIOCOMM_*` that are set and mean nothing, each with the one that may be meant, if any.

    Of processes that were started together on this host, with one environment, the first tells of them.
    """
    env = os.environ if env is None else env
    if env.get("AIOCOMM_LOCAL_RANK", "0") != "0":
        return []
    settings = (item.name for item in dataclasses.fields(Settings))
    known = [variable(name) for name in (*settings, *_NO_SETTINGS)]
    return unknown((name for name, text in env.items() if text), known)


def driver_library() -> str | None:
    """The library in libcuda's place (`AIOCOMM_LIBCUDA`), which tests use; None: the system's."""
    return os.environ.get("AIOCOMM_LIBCUDA") or None


def verbs_library() -> str | None:
    """The verbs library (`AIOCOMM_LIBIBVERBS`); None: the system's."""
    return os.environ.get("AIOCOMM_LIBIBVERBS") or None


def device_nodes() -> dict[str, int]:
    """NUMA nodes of RDMA devices as `AIOCOMM_RDMA_NODES` has them; what makes no sense is left out."""
    pairs = (pair.partition("=") for pair in os.environ.get("AIOCOMM_RDMA_NODES", "").split(","))
    return {name: int(node) for name, _, node in pairs if name and node.isdecimal()}


def environment_world(env: Mapping[str, str] | None = None) -> World:
    """The world that this process was launched into; of one process if it was not.

    Raises:
        UsageError: the environment contradicts itself or leaves out what cannot be derived.
    """
    return resolve_world(env=env)


def resolve_world(
    address: str | None = None,
    *,
    rank: int | None = None,
    size: int | None = None,
    name: str | None = None,
    token: str | None = None,
    links: tuple[str, ...] | None = None,
    warmup: bool = False,
    timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
) -> World:
    """The world that `connect`'s arguments and the environment describe together.

    Without an address (or with `env://`) rank, size and address come from the launcher; with one they do not.

    Raises:
        UsageError: arguments or environment contradict themselves.
    """
    env = os.environ if env is None else env
    settings = Settings.from_environment(env)
    if address is None or address == "env://":
        if address is None and size == 1:
            found = World(rank=0, size=1)
        else:
            found = detect(env, uid=os.getuid(), parent=os.getppid())
    else:
        found = World(address=address, rank=rank, size=size)
    return World(
        address=found.address,
        rank=found.rank if rank is None else rank,
        size=found.size if size is None else size,
        name=name if name is not None else env.get("AIOCOMM_NAME"),
        token=token if token is not None else _token(env),
        links=links if links is not None else settings.links,
        warmup=warmup,
        timeout_s=settings.timeout_s if timeout_s is None else timeout_s,
    )


def child_environment(
    variables: Mapping[str, str], defaults: Mapping[str, str] | None = None
) -> dict[str, str]:
    """This environment for a child process, with `variables`, and `defaults` where nothing is set."""
    return {**(defaults or {}), **os.environ, **variables}


def take_worker() -> tuple[int, int, int]:
    """What `spawn` tells a worker: descriptors of payload and outcome, and its process id. Not passed on to
    children.

    Raises:
        UsageError: this process was not started by `spawn`.
    """
    try:
        payload, outcome, parent = map(int, os.environ.pop("AIOCOMM_WORKER").split())
    except (KeyError, ValueError):
        raise UsageError("aiocomm._worker is started by aiocomm.spawn only") from None
    return payload, outcome, parent


def _token(env: Mapping[str, str]) -> str | None:
    """`AIOCOMM_TOKEN`, or the content of the file named by `AIOCOMM_TOKEN_FILE`."""
    if env.get("AIOCOMM_TOKEN"):
        return env["AIOCOMM_TOKEN"]
    path = env.get("AIOCOMM_TOKEN_FILE")
    if not path:
        return None
    try:
        mode = os.stat(path).st_mode
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read AIOCOMM_TOKEN_FILE: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"AIOCOMM_TOKEN_FILE {path} is open to other users; chmod 600 it")
    if not token:
        raise UsageError(f"AIOCOMM_TOKEN_FILE {path} is empty")
    return token

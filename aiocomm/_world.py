"""Which world a process belongs to, and where that meets. Pure: every function maps an environment to an
answer.

| launcher | recognised by | rank 0 listens at |
|---|---|---|
| `aiocomm run`, by hand | `AIOCOMM_RANK`, `AIOCOMM_SIZE`, `AIOCOMM_ADDRESS` | that address |
| torchrun | `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` | `MASTER_ADDR`, port `MASTER_PORT` + 1 |
| Open MPI | `OMPI_COMM_WORLD_RANK`, `OMPI_COMM_WORLD_SIZE` | `AIOCOMM_ADDRESS`, unless on one host |
| Hydra (MPICH, Intel MPI) | `PMI_RANK`, `PMI_SIZE` | `AIOCOMM_ADDRESS`, unless on one host |
| Slurm | `SLURM_PROCID`, `SLURM_STEP_ID` | first host of the step, a port from job and step id |

The first that matches counts. (torchrun's own store holds `MASTER_PORT`; `srun --mpi=pmi2` sets Hydra's two
as well, and is Slurm.) Where all processes are on one host they meet at an abstract Unix socket named after
the job, which needs no token. `AIOCOMM_ADDRESS` and `AIOCOMM_PORT` override the address and the port in each
case. Under no launcher, `AIOCOMM_ADDRESS` names an elastic world, and without it the process is a world of
its own; unless one of these launchers is there in part: that is an error, as each process would otherwise be
alone without a word.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MAX_RANKS", "NAME_LIMIT", "World", "detect", "first_host", "own_host"]

_OWN: Final = ("AIOCOMM_RANK", "AIOCOMM_SIZE", "AIOCOMM_ADDRESS")
_LABEL: Final = r"[0-9A-Za-z_](?:[0-9A-Za-z_-]{0,61}[0-9A-Za-z_])?"
_NAME: Final = re.compile(rf"(?:{_LABEL}\.)*(?![0-9]+\.?$){_LABEL}\.?")
MAX_RANKS: Final = 1 << 20
"""Ranks of a world, also of one that deals them out; the engine knows no higher ones."""
NAME_LIMIT: Final = 256
"""Characters of a process's name."""
_SLURM_PORTS: Final = range(20000, 32000)  # below Linux's ephemeral ports


@dataclass(frozen=True, slots=True)
class World:
    """What `connect` joins.

    `address` None is a world of this process alone. `size` None is an elastic world, whose rendezvous deals
    out the ranks (`rank` 0 hosts it). `token` None accepts only processes of the same user on the same host.
    `timeout_s` bounds joining.
    """

    address: str | None = None
    rank: int | None = None
    size: int | None = None
    name: str | None = None
    token: str | None = None
    links: tuple[str, ...] | None = None
    warmup: bool = False
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.size is not None:
            if self.size < 1:
                raise UsageError(f"a world of size {self.size} has no member")
            if self.size > MAX_RANKS:
                raise UsageError(f"a world of size {self.size} is too large: it may have {MAX_RANKS} members")
            if self.address is None and self.size > 1:
                raise UsageError(f"a world of {self.size} processes needs an address (AIOCOMM_ADDRESS)")
            if self.rank is None and self.address is not None:
                raise UsageError(
                    "a world of fixed size needs rank= too; leave out size= for an elastic world"
                )
            if self.rank is not None and not 0 <= self.rank < self.size:
                raise UsageError(
                    f"rank {self.rank} is not within a world of {self.size} (0 to {self.size - 1})"
                )
        elif self.rank not in (None, 0):
            raise UsageError(
                "in an elastic world the rendezvous deals out the ranks; give rank=0 only to host it"
            )
        if self.name is not None and len(self.name) > NAME_LIMIT:
            raise UsageError(
                f"a name of {len(self.name)} characters is too long: it may have {NAME_LIMIT} (AIOCOMM_NAME)"
            )
        for what, text in (("name", self.name), ("token", self.token)):
            try:
                (text or "").encode()
            except UnicodeEncodeError:  # as bytes of the environment become that are no UTF-8
                raise UsageError(
                    f"the {what} is not text (AIOCOMM_{what.upper()}): write it in UTF-8"
                ) from None
        if not self.timeout_s > 0:
            raise UsageError(f"timeout_s must be positive, not {self.timeout_s}")


def detect(env: Mapping[str, str], *, uid: int, parent: int) -> World:
    """The world that the launcher of this process describes.

    Args:
        env: the environment.
        uid: of this process; keeps two users' names apart.
        parent: process id of the parent, which Hydra's processes on one host have in common.

    Raises:
        UsageError: the environment contradicts itself or leaves out what cannot be derived.
    """
    # An empty one is as good as none, and blanks around a value mean nothing.
    env = {name: text.strip() for name, text in env.items() if text.strip()}
    if env.get("AIOCOMM_ADDRESS") == "env://":  # what the launcher says, which is the default
        del env["AIOCOMM_ADDRESS"]
    for launcher in (_own, _torchrun, _open_mpi, _hydra, _slurm):
        world = launcher(env, uid, parent)
        if world is not None:
            return world
    address = env.get("AIOCOMM_ADDRESS")
    if address and "AIOCOMM_SIZE" in env:
        raise UsageError(
            "AIOCOMM_SIZE is set, but AIOCOMM_RANK is not: without it the world is an elastic one"
        )
    if address:
        return World(address=address)
    _refuse_half(env)
    return World(rank=0, size=1)


def _refuse_half(env: Mapping[str, str]) -> None:
    """Raise if a launcher's variables are there in part, so that this process would be alone by mistake."""
    if env.get("AIOCOMM_RANK") or env.get("AIOCOMM_SIZE"):
        _refuse_half_own(env)
    if env.get("RANK") and env.get("WORLD_SIZE") not in (None, "", "1"):  # either alone may be anybody's
        _refuse_missing(env, "RANK and WORLD_SIZE are", ("MASTER_ADDR", "MASTER_PORT"))
    for names in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        for name in names:
            if name in env:
                _refuse_missing(env, f"{name} is", names)


def _refuse_half_own(env: Mapping[str, str]) -> None:
    given = [name for name in ("AIOCOMM_RANK", "AIOCOMM_SIZE") if env.get(name)]
    numbers = [_integer(env, name) for name in given]
    if numbers != [0, 1]:  # a world of one needs no address
        _refuse_missing(env, " and ".join(given) + (" is" if len(given) == 1 else " are"), _OWN)


def _refuse_missing(env: Mapping[str, str], there: str, needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if not env.get(name)]
    if missing:
        raise UsageError(
            f"{there} set, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: "
            "this process would be a world of its own"
        )


def _own(env: Mapping[str, str], uid: int, parent: int) -> World | None:
    if "AIOCOMM_RANK" not in env or not env.get("AIOCOMM_ADDRESS"):
        return None
    size = _integer(env, "AIOCOMM_SIZE") if "AIOCOMM_SIZE" in env else None
    return World(address=env["AIOCOMM_ADDRESS"], rank=_integer(env, "AIOCOMM_RANK"), size=size)


def _torchrun(env: Mapping[str, str], uid: int, parent: int) -> World | None:
    if not all(name in env for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    rank, size, port = _integer(env, "RANK"), _integer(env, "WORLD_SIZE"), _port(env, "MASTER_PORT")
    host = env["MASTER_ADDR"]
    job = (env.get("TORCHELASTIC_RUN_ID", ""), host, str(port), env.get("TORCHELASTIC_RESTART_COUNT", "0"))
    next_port = port + 1 if port < 65535 else port - 1
    if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
        return _place(env, rank, size, _local_name(uid, "torchrun", *job))
    return _place(env, rank, size, _tcp(env, host, next_port))


def _open_mpi(env: Mapping[str, str], uid: int, parent: int) -> World | None:
    if "OMPI_COMM_WORLD_RANK" not in env or "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    rank, size = _integer(env, "OMPI_COMM_WORLD_RANK"), _integer(env, "OMPI_COMM_WORLD_SIZE")
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid")
    local = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == env["OMPI_COMM_WORLD_SIZE"]
    address = _local_name(uid, "ompi", job) if local and job else None
    return _place(env, rank, size, address, launcher="Open MPI")


def _hydra(env: Mapping[str, str], uid: int, parent: int) -> World | None:
    if "PMI_RANK" not in env or "PMI_SIZE" not in env:
        return None
    if "MPI_LOCALNRANKS" not in env and _slurm_step(env) is not None:
        return None  # Hydra itself says how many are on this host, whoever has started it
    local = env.get("MPI_LOCALNRANKS") == env["PMI_SIZE"]
    address = _local_name(uid, "hydra", str(parent)) if local else None
    return _place(env, _integer(env, "PMI_RANK"), _integer(env, "PMI_SIZE"), address, launcher="Hydra")


def _slurm_step(env: Mapping[str, str]) -> str | None:
    """The step that this is a task of. A batch script has a SLURM_PROCID, but no step: it runs alone."""
    return env.get("SLURM_STEP_ID", env.get("SLURM_STEPID")) if "SLURM_PROCID" in env else None


def _slurm(env: Mapping[str, str], uid: int, parent: int) -> World | None:
    step = _slurm_step(env)
    if step is None:
        return None
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    rank, size = _integer(env, "SLURM_PROCID"), _integer(env, count)
    job = env.get("SLURM_JOB_ID", env.get("SLURM_JOBID", ""))
    if env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES")) == "1":
        return _place(env, rank, size, _local_name(uid, "slurm", job, step))
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", env.get("SLURM_JOB_NODELIST", "")))
    if not nodes:
        return _place(env, rank, size, None, launcher="Slurm")
    port = _SLURM_PORTS[_digest(job, step) % len(_SLURM_PORTS)]
    return _place(env, rank, size, _tcp(env, first_host(nodes), port))


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list, as in `gpu[03-05,9],login1` → `gpu03`.

    Raises:
        UsageError: the list's brackets do not match.
    """
    host, rest = "", nodes
    while rest:
        opened, comma = rest.find("["), rest.find(",")
        if opened < 0 or -1 < comma < opened:
            return host + rest.partition(",")[0]
        closed = rest.find("]", opened)
        first = rest[opened + 1 : closed].partition(",")[0].partition("-")[0]
        if closed < 0 or not first:
            raise UsageError(f"cannot read the node list {nodes!r}; set AIOCOMM_ADDRESS")
        host += rest[:opened] + first
        rest = rest[closed + 1 :]
    return host


def _place(env: Mapping[str, str], rank: int, size: int, address: str | None, launcher: str = "") -> World:
    """A world of fixed size at the address that was found, or that the user gives."""
    address = env.get("AIOCOMM_ADDRESS") or address
    if size == 1:
        return replace(World(rank=0, size=1), rank=rank)
    if address is None:
        raise UsageError(
            f"{launcher} does not say where rank 0 is; set AIOCOMM_ADDRESS=tcp://host:port for all processes"
        )
    return World(address=address, rank=rank, size=size)


def _tcp(env: Mapping[str, str], host: str, port: int) -> str:
    port = _port(env, "AIOCOMM_PORT") if "AIOCOMM_PORT" in env else port
    host = _unbracketed(host)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _local_name(uid: int, launcher: str, *job: str) -> str:
    return f"unix://@aiocomm-{uid}-{launcher}-{_digest(*job):016x}"


def _digest(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except KeyError:
        raise UsageError(f"{name} is not set, though its launcher's other variables are") from None
    except ValueError:
        raise UsageError(f"{name} must be a whole number, not {env[name]!r}") from None


def _port(env: Mapping[str, str], name: str) -> int:
    port = _integer(env, name)
    if not 0 < port < 65536:
        raise UsageError(f"{name} must be a port (1 to 65535), not {port}")
    return port


def _unbracketed(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def own_host(text: str) -> str:
    """A name or number without what other notations put around it, as `AIOCOMM_HOST` gives it.

    Raises:
        UsageError: it is neither, or no single address.
    """
    host = _unbracketed(text.strip())
    try:
        usable = not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        usable = _NAME.fullmatch(host) is not None
    if not usable:
        raise UsageError(
            f"AIOCOMM_HOST must be one name or address of this host, without a port, not {text!r}"
        )
    return host

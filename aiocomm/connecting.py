"""Joining a world."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

from aiocomm._numbers import integer
from aiocomm._operations import limit_of
from aiocomm.communicator import Communicator
from aiocomm.config import Settings, resolve_world
from aiocomm.errors import UsageError, UsageTypeError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from types import TracebackType

    from aiocomm._world import World

__all__ = ["Connecting", "connect", "joining_s", "names_of_links"]


def connect(
    address: str | None = None,
    *,
    rank: int | None = None,
    size: int | None = None,
    name: str | None = None,
    token: str | None = None,
    links: str | Sequence[str] | None = None,
    warmup: bool = False,
    deadline: float | None = None,
) -> Connecting:
    """Join a world: `comm = await connect(...)`, or `async with connect(...) as comm`.

    Without arguments rank, size and rendezvous come from the environment (`aiocomm run`, torchrun, Slurm,
    Open MPI); a process that nobody launched is a world of its own.

    Args:
        address: where rank 0 listens: `tcp://host:port`, `unix://path`, `unix://@name`, `file://path`, `env://`.
        rank: this process's rank in a world of fixed size; 0 hosts an elastic world.
        size: processes in the world; None: elastic, ranks grow and are never reused.
        name: shown to the peers.
        token: the group's secret. Without one only processes of the same user on the same host are accepted.
        links: links that may be used, e.g. `"tcp"` or `("shm", "tcp")`; default: all that work, the
            cheapest first.
        warmup: connect with all peers that do not leave meanwhile now instead of on first use (in an elastic
            world, with those who stay), and, of up to 16 ranks, take the memory of their rings now.
        deadline: seconds that joining may take, by default AIOCOMM_TIMEOUT_S.

    Raises:
        UsageError: arguments and environment contradict themselves or the world.
        AuthenticationError: the other side does not know the token.
        DeadlineExceeded: not all came in time; this process may try again.
        PeerLostError: rank 0 gave up before all had come.

    Cancelling the await leaves the world again and releases everything.

    A process that has left a world of fixed size by `aclose()` waits for the next world at the address, since
    rank 0 may be just about to leave the old one. Another process can take its rank in that.
    """
    for what, value in (("address", address), ("name", name), ("token", token)):
        if value is not None and not isinstance(value, str):
            raise UsageTypeError(f"{what}= takes a string, not {type(value).__name__}")
    world = resolve_world(
        address,
        rank=_integer("rank", rank),
        size=_integer("size", size),
        name=name,
        token=token,
        links=names_of_links(links),
        warmup=warmup,
        timeout_s=joining_s(deadline),
    )
    return Connecting(world, Settings.from_environment())


def joining_s(deadline: float | None) -> float | None:
    """Seconds that joining may take, as a caller gives them.

    Raises:
        UsageError: they are none.
    """
    if deadline is None:
        return None
    if not isinstance(deadline, Real) or not deadline > 0:  # also NaN
        raise UsageError(f"deadline={deadline!r}: seconds that joining may take, more than 0")
    return limit_of(deadline)


def names_of_links(links: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Links as a caller names them: one, or several.

    Raises:
        UsageError: they are not names, or none.
    """
    if links is None:
        return None
    if isinstance(links, str):
        return (links,)
    names = tuple(links) if hasattr(links, "__iter__") else (None,)
    if not all(isinstance(name, str) for name in names):
        raise UsageTypeError(f"links={links!r}: names of links, such as ('shm', 'tcp')")
    if not names:
        raise UsageError("links names none: leave it out for all that work here")
    return names  # type: ignore[return-value]


def _integer(name: str, value: int | None) -> int | None:
    return None if value is None else integer(name, value)


class Connecting:
    """What `connect` returns: await it, or enter it."""

    def __init__(self, world: World, settings: Settings) -> None:
        self._world = world
        self._settings = settings
        self._comm: Communicator | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(
                f"there is no {name!r} yet: connect() is to be awaited (comm = await aiocomm.connect(…)) or "
                "entered (async with aiocomm.connect(…) as comm)"
            )

    def __await__(self) -> Generator[Any, Any, Communicator]:
        return self._open().__await__()

    async def _open(self) -> Communicator:
        comm = Communicator(self._world, self._settings)
        try:
            await comm._start()
        except BaseException:
            await comm._abandon()
            raise
        return comm

    async def __aenter__(self) -> Communicator:
        self._comm = await self._open()
        return await self._comm.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._comm is not None
        await self._comm.__aexit__(kind, error, trace)

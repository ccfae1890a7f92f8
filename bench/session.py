"""What the suites about our own promises share: who is measured, and how their two processes are run."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import pair, peers, work
from .model import Subject
from .peers import ours

if TYPE_CHECKING:
    from .control import Control
    from .model import Metrics, Options

Main = Callable[[Any, int], Coroutine[Any, Any, dict[str, Any]]]


def subjects(names: Sequence[str]) -> Callable[[Options], list[Subject]]:
    """Return what lists those of `names` that the command line did not exclude."""

    def listed(options: Options) -> list[Subject]:
        found = [peers.find(name) for name in names if not options.peers or name in options.peers]
        return [Subject(p.name, p.kind, p.wire, p.missing()) for p in found]

    return listed


def run(program: str, name: str, options: Options, **arguments: Any) -> list[Metrics]:
    """Run ``program``, a function of role, control and arguments, as a pair in the mode called `name`."""
    environment = peers.find(name).environment
    everything = {"peer": name, **arguments}
    return pair.run(program, everything, options.timeout_s, environment=environment)


def within(role: int, control: Control, arguments: Mapping[str, Any], main: Main) -> dict[str, Any]:
    """In the child: run ``main(comm, role)`` with an open communicator, in the mode asked for."""
    peer = peers.find(arguments["peer"])

    async def opened() -> dict[str, Any]:
        comm = await ours.connect(role, control, "tcp" if peer.wire == "tcp" else "shm")
        found = await main(comm, role)
        await ours.Ours(comm).finish(control)
        return found

    return work.run_on(peer.loop, opened)

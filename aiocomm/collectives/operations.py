"""The public collective operations, the same on a communicator and on a group."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, overload

from aiocomm.collectives import movements, reductions, requests
from aiocomm.collectives.collecting import Collecting
from aiocomm.collectives.shared import DONE, option_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiocomm.channel import Channel
    from aiocomm.group import Group

__all__ = ["Collectives"]


class Collectives(Collecting):
    """Operations that every rank of a group calls.

    All ranks call the same operations in the same order on a channel; calls on different channels, and calls
    of one channel that overlap, do not wait for each other. A call begins when its coroutine first runs: a
    task that is cancelled before that has made none, and a trio nursery begins its tasks in any order. Common
    to all:

    - Arrays are host arrays of any library, contiguous in C order, or GPU arrays on all ranks. `out` and `x`
      are seen as flat.
    - `stream`: of GPU arrays, as for `send` and `recv`.
    - `sm_budget`: streaming multiprocessors that a reduction of GPU arrays may use at once, default 8. What
      only moves uses none.
    - `root` is a rank of the group.
    - `algorithm`: instead of the one that the cost model chooses; the same on all ranks.
    - `channel`: whose priority and weight apply, default `comm.default`. One that is none, or another
      communicator's, is refused at this rank only, which cannot know where the others wait for it.
    - `deadline`: seconds from now; `DeadlineExceeded` then names the ranks that have not called.
    - `UsageError`, the same on all ranks, if they differ in operation, dtype, counts, root or algorithm, or
      if one rank's arguments are wrong. The contents of outputs are undefined then.
    - `PeerLostError` naming a rank that is gone; `TransferCancelled` if another gave up or was cancelled.
    - A call succeeds only when all ranks have called it.
    - Cancelling the awaiting task ends the call on all ranks; the await ends once nothing touches the arrays.
    """

    @overload
    async def split(self, color: int, key: int = 0, *, deadline: float | None = None) -> Group: ...

    @overload
    async def split(self, color: None, key: int = 0, *, deadline: float | None = None) -> None: ...

    @overload
    async def split(
        self, color: int | None, key: int = 0, *, deadline: float | None = None
    ) -> Group | None: ...

    async def split(self, color: int | None, key: int = 0, *, deadline: float | None = None) -> Group | None:
        """Divide the group: ranks that name one colour become a group. All ranks of this group call it.

        Args:
            color: 0 or more; None: this rank joins none, and gets None.
            key: orders the ranks of the new group; equal keys keep this group's order. Both are of 64 bits.
        """
        group = self._members()
        try:
            chosen = None if color is None else requests.color_of(color)
            order = requests.key_of(key)
        except Exception as error:  # the others wait, whatever is wrong
            await self._collect("split", partial(_refuse, error), None, deadline)
            raise
        return await group._split(chosen, order, deadline)

    async def shrink(self, *, deadline: float | None = None) -> Group:
        """Make a group of the members that are left. All of them call it, after whatever failed.

        The survivors agree on who they are, also if a member dies meanwhile. Their order stays.

        Raises:
            PeerLostError: the others have lost this rank.
            DeadlineExceeded: a survivor has not called in time.
        """
        return await self._members()._shrink(deadline)

    async def barrier(self, *, channel: Channel | None = None, deadline: float | None = None) -> None:
        """Wait until all ranks have called it."""
        begun = self._repeats.attempt("barrier", None, None, None, None, channel, deadline, None)
        if begun == DONE:
            return
        await self._collect(
            "barrier", lambda group: requests.barrier(), channel, deadline, ("barrier",), begun=begun
        )

    async def broadcast(
        self,
        x: Any,
        root: int = 0,
        *,
        algorithm: str | None = None,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> None:
        """Copy the root's array to all ranks.

        Args:
            x: read at the root, written elsewhere.
        """
        begun = self._repeats.attempt("broadcast", x, None, root, algorithm, channel, deadline, stream)
        if begun == DONE:
            return
        await self._collect(
            "broadcast",
            lambda g: movements.moved(g, "broadcast", x, None, root=root, algorithm=algorithm, stream=stream),
            channel,
            deadline,
            ("broadcast", root, algorithm),
            None,
            x,
            stream,
            begun=begun,
        )

    async def scatter(
        self,
        out: Any,
        x: Any = None,
        root: int = 0,
        *,
        algorithm: str | None = None,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> None:
        """Give each rank its block of the root's array.

        Args:
            out: one block.
            x: `size` blocks, in the order of the ranks; at the root only.
        """
        given = x if requests.is_root(self._members(), root) else None
        await self._collect(
            "scatter",
            lambda g: movements.moved(g, "scatter", out, x, root=root, algorithm=algorithm, stream=stream),
            channel,
            deadline,
            ("scatter", root, algorithm),
            given,
            out,
            stream,
        )

    async def scatterv(
        self,
        out: Any,
        x: Any = None,
        counts: Sequence[int] | None = None,
        root: int = 0,
        *,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> None:
        """`scatter` of blocks of different size.

        Args:
            out: this rank's block.
            x: all blocks, at the root only.
            counts: their elements, at the root only.
        """
        await self._collect(
            "scatterv",
            lambda g: movements.moved(g, "scatterv", out, x, root=root, counts=counts, stream=stream),
            channel,
            deadline,
        )

    async def gather(
        self,
        out: Any,
        x: Any,
        root: int = 0,
        *,
        algorithm: str | None = None,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> None:
        """Bring the arrays of all ranks to the root.

        Args:
            out: `size` blocks, in the order of the ranks; at the root only, elsewhere None.
            x: one block; at the root it may be its own block of `out`.
        """
        into = out if requests.is_root(self._members(), root) else None
        await self._collect(
            "gather",
            lambda g: movements.moved(g, "gather", out, x, root=root, algorithm=algorithm, stream=stream),
            channel,
            deadline,
            ("gather", root, algorithm),
            x,
            into,
            stream,
        )

    async def gatherv(
        self,
        out: Any,
        x: Any,
        counts: Sequence[int] | None = None,
        root: int = 0,
        *,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> None:
        """`gather` of blocks of different size.

        Args:
            out: all blocks, at the root only.
            x: this rank's block.
            counts: elements of all blocks, at the root only.
        """
        await self._collect(
            "gatherv",
            lambda g: movements.moved(g, "gatherv", out, x, root=root, counts=counts, stream=stream),
            channel,
            deadline,
        )

    async def all_gather(
        self,
        out: Any,
        x: Any,
        *,
        algorithm: str | None = None,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> None:
        """Bring the arrays of all ranks to all ranks.

        Args:
            out: `size` blocks, in the order of the ranks.
            x: one block, of the same size on all ranks; may be this rank's block of `out`.
        """
        begun = self._repeats.attempt("all_gather", out, x, None, algorithm, channel, deadline, stream)
        if begun == DONE:
            return
        await self._collect(
            "all_gather",
            lambda g: movements.moved(g, "all_gather", out, x, algorithm=algorithm, stream=stream),
            channel,
            deadline,
            ("all_gather", algorithm),
            x,
            out,
            stream,
            begun=begun,
        )

    async def all_gatherv(
        self,
        out: Any,
        x: Any,
        counts: Sequence[int],
        *,
        algorithm: str | None = None,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> None:
        """`all_gather` of blocks of different size.

        Args:
            counts: elements of all ranks' blocks; the same on all ranks.
        """
        await self._collect(
            "all_gatherv",
            lambda g: movements.moved(
                g, "all_gatherv", out, x, algorithm=algorithm, counts=counts, stream=stream
            ),
            channel,
            deadline,
        )

    async def all_to_all(
        self,
        out: Any,
        x: Any,
        *,
        algorithm: str | None = None,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> None:
        """Block j of rank i becomes block i of rank j.

        Args:
            out: `size` blocks, in the order of the ranks they come from.
            x: `size` blocks, in the order of the ranks they are for.
        """
        begun = self._repeats.attempt("all_to_all", out, x, None, algorithm, channel, deadline, stream)
        if begun == DONE:
            return
        await self._collect(
            "all_to_all",
            lambda g: movements.moved(g, "all_to_all", out, x, algorithm=algorithm, stream=stream),
            channel,
            deadline,
            ("all_to_all", algorithm),
            x,
            out,
            stream,
            begun=begun,
        )

    async def all_to_allv(
        self,
        out: Any,
        x: Any,
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
        *,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> None:
        """`all_to_all` of blocks of different size.

        Args:
            recv_counts: elements that come from each rank.
            send_counts: elements that go to each rank.
        """
        await self._collect(
            "all_to_allv",
            lambda g: movements.moved(
                g, "all_to_allv", out, x, counts=recv_counts, send_counts=send_counts, stream=stream
            ),
            channel,
            deadline,
        )

    async def reduce(
        self,
        x: Any,
        root: int = 0,
        op: str = "sum",
        *,
        out: Any = None,
        algorithm: str | None = None,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
        sm_budget: int | None = None,
    ) -> None:
        """Reduce the arrays of all ranks, elementwise, to the root.

        Args:
            x: at the root it becomes the result, unless there is `out`.
            op: `sum`, `prod`, `min`, `max` or `mean`, computed in the array's dtype, float8 in float32 and
                rounded once; on GPUs those of 16 and 8 bits in float32, rounded after each pair. Of bools on
                the host `min` (of all) and `max` (of any).
            out: the result; at the root only.
        """
        into = None
        if requests.is_root(self._members(), root):
            into = x if out is None else out
        given = None if into is x else x
        await self._collect(
            "reduce",
            lambda g: reductions.reduced(
                g,
                "reduce",
                x,
                op,
                out=out,
                root=root,
                algorithm=algorithm,
                stream=stream,
                sm_budget=sm_budget,
            ),
            channel,
            deadline,
            ("reduce", root, op, algorithm, sm_budget),
            given,
            into,
            stream,
        )

    async def reduce_scatter(
        self,
        out: Any,
        x: Any,
        op: str = "sum",
        *,
        counts: Sequence[int] | None = None,
        algorithm: str | None = None,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
        sm_budget: int | None = None,
    ) -> None:
        """Reduce the arrays of all ranks, elementwise, and give each rank its block of the result.

        Args:
            out: one block.
            x: `size` blocks; not changed.
            op: as for `reduce`.
            counts: elements of the blocks, where they are not of one size; the same on all ranks.
        """
        await self._collect(
            "reduce_scatter",
            lambda g: reductions.reduced(
                g,
                "reduce_scatter",
                x,
                op,
                out=out,
                algorithm=algorithm,
                counts=counts,
                stream=stream,
                sm_budget=sm_budget,
            ),
            channel,
            deadline,
            ("reduce_scatter", op, algorithm, sm_budget) if counts is None else None,
            x,
            out,
            stream,
        )

    async def all_reduce(
        self,
        x: Any,
        op: str = "sum",
        *,
        out: Any = None,
        algorithm: str | None = None,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
        sm_budget: int | None = None,
    ) -> None:
        """Reduce the arrays of all ranks, elementwise, to all ranks, which get the same bits.

        The order of the reduction depends on the algorithm and the group only, not on timing. Sign and
        payload of a NaN may differ.

        Args:
            x: becomes the result, unless there is `out`.
            op: as for `reduce`.
        """
        begun = self._repeats.attempt(
            "all_reduce",
            x if out is None else out,
            None if out is None else x,
            op,
            option_of(algorithm, sm_budget),
            channel,
            deadline,
            stream,
        )
        if begun == DONE:
            return
        await self._collect(
            "all_reduce",
            lambda g: reductions.reduced(
                g, "all_reduce", x, op, out=out, algorithm=algorithm, stream=stream, sm_budget=sm_budget
            ),
            channel,
            deadline,
            ("all_reduce", op, algorithm, sm_budget),
            None if out is None else x,
            x if out is None else out,
            stream,
            begun=begun,
        )


def _refuse(error: Exception, _group: Group) -> NoReturn:
    raise error

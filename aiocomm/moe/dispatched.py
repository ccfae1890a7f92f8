"""What a dispatch brought to this rank, and what it needs to bring results back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiocomm._numbers import integer
from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from aiocomm.collectives.scope import Scope
    from aiocomm.group import Group
    from aiocomm.moe.placement import Placement
    from aiocomm.moe.routing import Arrangement, Part
    from aiocomm.moe.tables import Tables

    Integers = NDArray[np.int64]

__all__ = ["Dispatched", "named"]


def named(scope: Scope) -> str:
    """The channel of a scope of dispatches, for messages; of the default one there is nothing to say."""
    for name, (one, _) in scope.group._expert_scopes.items():
        if one is scope and name:
            return f" on channel {name!r}"
    return ""


class Dispatched:
    """The tokens that other ranks, and this one, routed to the experts of this rank. Made by `dispatch`.

    A row is a token of some rank; an assignment is a row and one of its experts here. Assignments are kept by
    expert, and there by row; the experts of a rank are in ascending order.
    """

    def __init__(
        self,
        group: Group,
        number: int,
        placement: Placement,
        sent: Sequence[Part],
        count: int,
        tokens: Any,
        found: Arrangement,
        tables: Tables | None = None,
        where: str = "",
    ) -> None:
        self._group = group
        self._number = number
        self._placement = placement
        self._sent = sent
        self._count = count
        self._found = found
        self._tokens = tokens
        self._tables = tables  # of tokens on a GPU
        self._where = where

    @property
    def _label(self) -> str:
        """Which dispatch of the group it was, for all ranks to compare: every channel numbers its own."""
        return f"dispatch {self._number}{self._where}"

    @property
    def tokens(self) -> Any:
        """One row per token, each once, by the rank it comes from; shape (rows, hidden).

        A NumPy array, or where the tokens came from GPUs, a `DeviceArray`:
        `torch.as_tensor(came.tokens, device="cuda")`. It shows dtypes that NumPy has not as bytes, row by
        row: `.view(torch.bfloat16)`. When the last array over it goes, its memory is used again after the
        work that is queued then on the stream that `dispatch` was called with.
        """
        return self._tokens

    @property
    def rows(self) -> Integers:
        """The row of each assignment."""
        return self._found.rows

    @property
    def weights(self) -> NDArray[np.float32]:
        """The weight of each assignment. `combine` applies it."""
        return self._found.weights

    @property
    def experts(self) -> Integers:
        """The experts of this rank, ascending."""
        return self._placement.held[self._group.rank]

    @property
    def offsets(self) -> Integers:
        """The first assignment of each of `experts`, and at the end the number of all."""
        return self._found.offsets

    @property
    def starts(self) -> Integers:
        """The first row of each rank of the group, and at the end the number of all."""
        return self._found.starts

    @property
    def inputs(self) -> NDArray[Any]:
        """The tokens once per assignment, as a grouped matrix product takes them; a copy.

        Raises:
            UsageError: they are on a GPU, where the array library's own indexing makes it.
        """
        if self._tables is not None:
            raise UsageError(
                "inputs is of host arrays; tokens on a GPU are indexed by their own library: "
                'torch.as_tensor(came.tokens, device="cuda")[came.rows]'
            )
        return self._tokens[self._found.rows]  # type: ignore[no-any-return]

    def of(self, expert: int) -> slice:
        """The assignments of an expert of this rank: `rows[of(e)]` are its rows.

        Args:
            expert: its number among all experts.

        Raises:
            UsageError: it is held by another rank.
        """
        placement, expert = self._placement, integer("expert", expert)
        if not 0 <= expert < placement.experts or placement.owner[expert] != self._group.rank:
            raise UsageError(f"expert {expert} is not one of this rank's: {self.experts.tolist()}")
        local = int(placement.local[expert])
        return slice(int(self.offsets[local]), int(self.offsets[local + 1]))

    def routed_to(self, rank: int) -> Integers:
        """This rank's tokens, by index, that have an expert on a rank of the group; ascending.

        Raises:
            UsageError: there is no such rank.
        """
        place = integer("rank", rank)
        if not 0 <= place < len(self._sent):
            raise UsageError(f"rank={place}: ranks of this group are 0 to {len(self._sent) - 1}")
        return self._sent[place].tokens

    def __repr__(self) -> str:
        return (
            f"<aiocomm.Dispatched {int(self.starts[-1])} tokens for {len(self.rows)} assignments to "
            f"{len(self.experts)} experts on rank {self._group.rank}>"
        )

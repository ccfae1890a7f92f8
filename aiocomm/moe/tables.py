"""What the kernel that sums needs beside rows, in memory that a pool uses again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from aiocomm._device import Description
    from aiocomm.moe.memory import Pool
    from aiocomm.moe.routing import Arrangement, Part

    Bytes = NDArray[np.uint8]

__all__ = ["Tables"]


class Tables:
    """What the sums of a combine need: written in host memory, and uploaded.

    Args:
        assignments: that this rank has received.
        rows: of them.
        count: of its own tokens.
        size: of the group.
    """

    def __init__(self, pool: Pool, assignments: int, rows: int, count: int, size: int) -> None:
        self._pool = pool
        self.resize(assignments, rows, count, size)
        self._pinned, self._block = pool.take_tables(self._places()[-1])

    @classmethod
    def of_bytes(cls, pool: Pool, nbytes: int) -> Tables:
        """Of so many bytes, for sizes that are said by `resize`."""
        made = cls.__new__(cls)
        made._pool = pool
        made._pinned, made._block = pool.take_tables(nbytes)
        return made

    @classmethod
    def of_size(cls, pool: Pool, size: tuple[int, int, int, int], spare: Tables | None) -> Tables:
        """Not written; `spare` again where it is large enough."""
        if spare is None or _core.sum_tables(*size)[-1] > min(spare.bytes.nbytes, spare._block.nbytes):
            return cls(pool, *size)
        spare.resize(*size)
        return spare

    def resize(self, assignments: int, rows: int, count: int, size: int) -> None:
        """Make them those of other sizes, which are not larger."""
        self._size = assignments, rows, count, size

    def _places(self) -> tuple[int, ...]:
        return _core.sum_tables(*self._size)

    @property
    def of_terms(self) -> tuple[int, ...]:
        """Addresses of their order, of each row's first, and of the weights."""
        return tuple(self._block.address + start for start in self._places()[:3])

    @property
    def parts(self) -> int:
        """Address of the tokens' rows."""
        return self._block.address + self._places()[3]

    @property
    def address(self) -> int:
        """Where `upload` brings them."""
        return self._block.address

    @classmethod
    def made(
        cls,
        pool: Pool,
        found: Arrangement,
        parts: Sequence[Part],
        count: int,
        spare: Tables | None = None,
    ) -> Tables:
        """Written and on their way.

        Args:
            found: what this rank has received.
            parts: what it has sent to each rank.
            count: of its tokens.
            spare: tables that are not used, and may be large enough.
        """
        tables = cls.of_size(pool, (len(found.order), len(found.first) - 1, count, len(parts)), spare)
        tokens = [part.tokens for part in parts]
        _core.write_sum_tables(found.order, found.first, found.weights, tokens, count, tables.bytes)
        tables.upload()
        return tables

    @property
    def bytes(self) -> Bytes:
        """Where they are written."""
        return self._pinned.bytes

    def upload(self) -> None:
        """Bring what is written to the GPU."""
        self._pool.upload(self._block, self._pinned, self._places()[-1])

    @property
    def device(self) -> int:
        """Ordinal of the GPU."""
        return self._pool.device

    @property
    def ready(self) -> Description:
        """Memory whose stream has brought them."""
        block, kernels = self._block, self._pool.kernels
        return block.memory, block.address, 1, kernels.device, kernels.stream, "B", (1,)

    def __del__(self) -> None:
        if hasattr(self, "_block"):
            self._pool.give_back_tables(self._block.address)

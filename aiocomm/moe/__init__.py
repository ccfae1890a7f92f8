"""Exchange of a mixture of experts: tokens to the ranks that hold their experts, weighted results back.

`placement` says which rank holds which expert, `routing` who gets which rows, `weighting` how results are
summed, `wire` what a message looks like (all pure); `exchange` moves them.
"""

from aiocomm.moe.dispatched import Dispatched

__all__ = ["Dispatched"]

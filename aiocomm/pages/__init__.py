"""Paged memory: what the pages of a KV cache are, and transfers between page lists of two processes.

`layout` describes and `planner` lowers two page lists to copies (both pure), `lease` makes pages reachable
for peers, `transfers` moves them.
"""

from aiocomm.pages.layout import Pages
from aiocomm.pages.lease import PageLease, RemotePages

__all__ = ["PageLease", "Pages", "RemotePages"]

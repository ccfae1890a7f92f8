"""The suites that the tool runs; a new one (GPU, RDMA, collectives) is a module and a line here."""

from . import pairs
from .model import Suite

SUITES: dict[str, Suite] = {suite.name: suite for suite in (pairs.SUITE,)}

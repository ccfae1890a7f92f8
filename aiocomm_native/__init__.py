"""Native core of aiocomm; its public face is the `aiocomm` package."""

from aiocomm_native._core import Status, Transfer

__all__ = ["Status", "Transfer"]

"""Native core of aiocomm; its public face is the `aiocomm` package."""

import pkgutil

# In a checkout the working folder shadows the installed package, which has the extension module.
__path__ = pkgutil.extend_path(__path__, __name__)

from aiocomm_native._core import Status, Transfer

__all__ = ["Status", "Transfer"]

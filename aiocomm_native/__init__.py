"""Native core of aiocomm; its public face is the `aiocomm` package."""

import importlib
import pkgutil

# In a checkout the working folder shadows the installed package, which has the extension module.
__path__ = pkgutil.extend_path(__path__, __name__)


def _refuse_elsewhere() -> None:
    """Keep it to the main interpreter: imported in another, it would break what the main one has of it.

    Raises:
        ImportError: this is another.
    """
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            raise ImportError(
                "aiocomm works in the main interpreter only, not in sub-interpreters: use processes"
            )
        return


_refuse_elsewhere()

from aiocomm_native._core import Status, Transfer  # noqa: E402  # only where it may be

__all__ = ["Status", "Transfer"]

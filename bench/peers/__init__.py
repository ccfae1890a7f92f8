"""The peers: one module each, found by looking into this folder; a module lists its modes in ``PEERS``."""

import importlib
import pkgutil
from functools import cache

from .base import Array, Peer, Transport

__all__ = ["Array", "Peer", "Transport", "find", "registry"]


@cache
def registry() -> dict[str, Peer]:
    """Return every peer by name, raw copies first, ours last. No peer's own library is imported for that."""
    modules = [
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
        if info.name != "base"
    ]
    kinds = ("raw", "handmade", "peer", "ours")
    found = sorted((p for m in modules for p in m.PEERS), key=lambda p: kinds.index(p.kind))
    names = [p.name for p in found]
    if len(set(names)) != len(names):
        raise RuntimeError(f"two peers with one name: {names}")
    return {p.name: p for p in found}


def find(name: str) -> Peer:
    """Return the peer of that name.

    Raises:
        KeyError: No such peer.
    """
    try:
        return registry()[name]
    except KeyError:
        raise KeyError(f"no peer {name!r}; there are: {', '.join(registry())}") from None

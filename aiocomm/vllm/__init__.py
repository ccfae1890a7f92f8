"""The KV connector for vLLM: name this module in `kv_connector_module_path`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiocomm.vllm.connector import AiocommConnector

__all__ = ["AiocommConnector"]


def __getattr__(name: str) -> Any:
    """Import vLLM only when the connector is asked for: what lies below it does without."""
    if name == "AiocommConnector":
        from aiocomm.vllm.connector import AiocommConnector

        return AiocommConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

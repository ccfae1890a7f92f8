"""Event loops: how the native engine's completions reach asyncio, uvloop and trio."""

"""The main job as a program: prefill in one process, decode in another, keys and values moving meanwhile."""

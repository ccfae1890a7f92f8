"""What pytest runs inside the guest. Emulated seconds are dear: what other machines can test is not here."""

# The guest's own tests; that the link keeps the promises of every link, on asyncio; and that cancelling does
# on trio, too, which has its own way of it. README.md has the command for all of it on all loops.
SELECTED = "guest or (rdma and (asyncio or (trio and test_cancel)))"
ARGUMENTS = (
    "-v",
    "--durations=10",
    "--timeout=120",
    "-k",
    SELECTED,
    "tests/rdma_vm/guest",
    *(f"tests/links/test_{name}.py" for name in ("messages", "cancel", "onesided", "shared_arrays")),
    *(f"tests/links/test_gpu.py::test_{way}" for way in ("gpu_to_gpu", "gpu_to_host", "host_to_gpu")),
)
LIMIT_S = 1200
"""For all of it, boot not included."""

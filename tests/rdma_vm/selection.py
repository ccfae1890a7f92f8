"""What pytest runs inside the guest. Emulated seconds are dear: what other machines can test is not here."""

# The guest's own tests; that the link keeps the promises of every link, on asyncio; and that cancelling does on trio, too,
# which has its own way of it. All of it on all loops: `run.py --limit 1800 -- pytest tests/links tests/fault/test_kill.py
# -k rdma`.
SELECTED = "guest or (rdma and (asyncio or (trio and test_cancel)))"
ARGUMENTS = (
    "-v",
    "--durations=10",
    "--timeout=120",
    "-k",
    SELECTED,
    "tests/rdma_vm/guest",
    *(f"tests/links/test_{name}.py" for name in ("messages", "cancel", "onesided", "shared_arrays")),
)
LIMIT_S = 900
"""For all of it, boot not included."""

"""What pytest runs inside the guest. Emulated seconds are dear: what other machines can test is not here."""

# The guest's own tests, and that messages keep the promises of every link.
# `run.py -- pytest tests/links -k rdma` runs the whole conformance suite.
SELECTED = "guest or (rdma and asyncio and test_messages)"
ARGUMENTS = (
    "-v",
    "--durations=10",
    "--timeout=120",
    "-k",
    SELECTED,
    "tests/rdma_vm/guest",
    "tests/links/test_messages.py",
)
LIMIT_S = 900
"""For all of it, boot not included."""

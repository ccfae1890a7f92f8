"""What pytest runs inside the guest. Emulated seconds are dear: what other machines can test is not here."""

ARGUMENTS = ("-v", "--durations=10", "--timeout=120", "tests/rdma_vm/guest")
LIMIT_S = 360
"""For all of it, boot not included."""

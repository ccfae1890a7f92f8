"""What pytest runs inside the guest. Emulated seconds are dear: what other machines can test is not here."""

# All of the guest's own tests; of the links' conformance on rdma, all on asyncio, and on the other loops what
# depends on the loop. `run.py -- pytest tests/links -k rdma` runs all on all.
_LOOPS = "test_a_posted_receive or test_a_send_under_way or test_one_sided or test_cancelling_the_task"
SELECTED = f"guest or (rdma and asyncio) or (rdma and ({_LOOPS}))"
ARGUMENTS = ("-v", "--durations=10", "--timeout=120", "-k", SELECTED, "tests/rdma_vm/guest", "tests/links")
LIMIT_S = 900
"""For all of it, boot not included."""

"""What pytest runs inside the guest. Emulated seconds are dear: what other machines can test is not here."""

# The guest's own tests; that the link keeps the promises of every link, on asyncio; and that cancelling does
# on trio, too, which has its own way of it. README.md has the command for all of it on all loops.
# Loops that spin have a way of their own for small messages: some of what test_spinning has.
_SPINNING = "test_spinning and (random_traffic or both_directions_at_once or cancelling_the_task)"
_LINKS = ("messages", "cancel", "onesided", "shared_arrays", "spinning", "calls")
SELECTED = f"(guest or (rdma and (asyncio or (trio and test_cancel) or ({_SPINNING}))))"
ARGUMENTS = (
    "-v",
    "--durations=10",
    "--timeout=400",
    "-k",
    SELECTED,
    "tests/rdma_vm/guest",
    *(f"tests/links/test_{name}.py" for name in _LINKS),
    *(f"tests/links/test_gpu.py::test_{way}" for way in ("gpu_to_gpu", "gpu_to_host", "host_to_gpu")),
    *(
        f"tests/integration/test_gpu_between_hosts.py::test_{what}"
        for what in ("pages_of_all_forms", "layers_are_told_as_they_come", "experts")
    ),
)
LIMIT_S = 1800
"""For all of it, boot not included."""

"""Boots the virtual machine once, runs in it what needs RDMA devices, and tells how that ended."""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import image
import initramfs
import selection
import vm

if TYPE_CHECKING:
    from collections.abc import Callable

REQUIRED = os.environ.get("AIOCOMM_REQUIRE_RDMA_VM", "") not in ("", "0")
inside = pytest.mark.skipif(bool(os.environ.get("AIOCOMM_RDMA_GUEST")), reason="this is the guest")


def read_junit(path: Path) -> tuple[Counter[str], list[str], list[str]]:
    """How often each outcome occurred, and what failed or was skipped, by name."""
    counts: Counter[str] = Counter()
    failed: list[str] = []
    skipped: list[str] = []
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name', '')}".removeprefix("tests.")
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failed.append(name)
        elif (mark := case.find("skipped")) is not None:
            counts["skipped"] += 1
            skipped.append(f"{name}: {mark.get('message', '')}")
        else:
            counts["passed"] += 1
    return counts, failed, skipped


@inside
@pytest.mark.timeout(selection.LIMIT_S + vm.BOOT_S + 30)
def test_what_needs_rdma_devices(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    lacks = vm.missing()
    if lacks:
        text = f"RDMA tests need a virtual machine; missing: {', '.join(lacks)}. {vm.advice(lacks)}"
        if REQUIRED:
            pytest.fail(f"{text} (AIOCOMM_REQUIRE_RDMA_VM is set)")
        pytest.skip(f"left out: {text}")
    outcome = vm.run(["pytest", *selection.ARGUMENTS], tmp_path, limit_s=selection.LIMIT_S)
    if not outcome.junit.exists():
        pytest.fail(outcome.explained(), pytrace=False)
    counts, failed, skipped = read_junit(outcome.junit)
    told = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    record_property("guest", f"{told} in the RDMA guest, {outcome.wall_s:.0f} s with its boot")
    if outcome.status or failed:
        names = "\n".join(failed)
        pytest.fail(f"{told} inside\n{names}\n{outcome.explained()}", pytrace=False)
    assert counts["passed"], outcome.explained()
    assert not skipped, "the guest has all that its tests need:\n" + "\n".join(skipped)


def test_junit_of_the_guest_is_read(tmp_path: Path) -> None:
    (path := tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="good"/>'
        '<testcase classname="tests.a" name="bad"><failure message="x"/></testcase>'
        '<testcase classname="tests.a" name="broken"><error message="x"/></testcase>'
        '<testcase classname="tests.a" name="later"><skipped message="why"/></testcase>'
        "</testsuite></testsuites>"
    )
    counts, failed, skipped = read_junit(path)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failed == ["a.bad", "a.broken"]
    assert skipped == ["a.later: why"]


def test_modules_load_after_those_they_need(tmp_path: Path) -> None:
    (tmp_path / "modules.builtin").write_text("kernel/fs/built-in.ko\n")
    (tmp_path / "modules.dep").write_text(
        "a/top.ko.xz: a/mid-dle.ko a/low.ko\na/mid-dle.ko: a/low.ko\na/low.ko:\n"
    )
    order = initramfs.load_order(tmp_path, ("top", "built_in"))
    assert [path.name for path in order] == ["low.ko", "mid-dle.ko", "top.ko.xz"]
    with pytest.raises(LookupError, match="no module absent"):
        initramfs.load_order(tmp_path, ("absent",))


def test_what_is_missing_comes_with_its_package() -> None:
    assert vm.advice({"qemu-system-x86_64": "qemu-system-x86", "rdma": "iproute2"}) == (
        "apt-get install iproute2 qemu-system-x86"
    )
    assert vm.advice({"an x86-64 machine (this is arm)": ""}) == "there is no remedy on this machine"


def test_a_file_that_goes_while_the_image_is_made_is_left_out(tmp_path: Path) -> None:
    """Another process compiles, and renames what it has written."""
    (tmp_path / "there").write_text("text")
    for name in ("there", "gone"):
        image._place(tmp_path / name, tmp_path / "image" / name)
    assert [path.name for path in (tmp_path / "image").iterdir()] == ["there"]

"""Build the extension with sanitizers and run tests under it; the working environment stays as it is.

    python tests/native/run_sanitized.py address,undefined tests/links tests/fault -k asyncio
    python tests/native/run_sanitized.py thread tests/links -k asyncio

Needs the packages of the `test` extra, and g++ with its sanitizer libraries. The build is kept in build/, so
that a second run compiles only what has changed. Exit status: pytest's, or 1 where a sanitizer has reported
anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
RUNTIME: Final = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS: Final = {
    # CPython keeps memory to its end; leaks are looked for by what the tests count.
    "address": {"ASAN_OPTIONS": "detect_leaks=0:log_path={log}"},
    "thread": {"TSAN_OPTIONS": "log_path={log}:suppressions={suppressions}:report_signal_unsafe=0"},
}


def build(sanitizers: str, target: Path) -> None:
    """Install the package, built with sanitizers, into `target`."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(ROOT)]
    command += [f"--config-settings=cmake.define.AIOCOMM_SANITIZE={sanitizers}"]
    command += [f"--config-settings=build-dir={ROOT}/build/sanitized-{sanitizers.replace(',', '-')}"]
    subprocess.run(command, check=True)


def run(sanitizers: str, target: Path, arguments: list[str], log: Path) -> int:
    """Run pytest over what is in `target`; returns its status."""
    kind = sanitizers.partition(",")[0]
    # The C++ library, too: an interceptor looks for what it throws with when the runtime is loaded.
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in (RUNTIME[kind], "libstdc++.so.6")
    ]
    suppressions = ROOT / "tests/native/tsan.supp"
    options = {k: v.format(log=log, suppressions=suppressions) for k, v in OPTIONS[kind].items()}
    environment = (
        os.environ
        | options
        | {
            "LD_PRELOAD": " ".join(libraries),
            "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:log_path={log}",
            "PYTHONPATH": str(target),
            "PYTHONSAFEPATH": "1",
            "PYTHONMALLOC": "malloc",  # every object by itself, or overruns would stay within an arena
        }
    )
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment).returncode


def main(arguments: list[str]) -> int:
    """Build, run, show what was reported."""
    if not arguments or arguments[0].partition(",")[0] not in RUNTIME:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        target, log = Path(folder) / "site", Path(folder) / "log"
        build(arguments[0], target)
        status = run(arguments[0], target, arguments[1:], log)
        reports = sorted(Path(folder).glob("log.*"))
        for report in reports:
            print(f"== {report.name}", report.read_text(errors="replace")[:20_000], sep="\n")
    print(f"{len(reports)} reports of {arguments[0]}")
    return status or bool(reports)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

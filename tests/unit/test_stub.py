"""The stubs say what the extension module has."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import aiocomm_native
from aiocomm_native import _core

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
BY_HAND = ROOT / "aiocomm_native" / "__init__.pyi"

# What every class has, or CPython gives to a type with such slots.
IMPLIED = {"__doc__", "__module__", "__init__", "__new__", "__repr__", "__weakref__"}


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_stub", ROOT / "aiocomm_native" / "make_stub.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_stub_is_current() -> None:
    for path, text in generator().generate().items():
        assert path.read_text() == text, "run: python aiocomm_native/make_stub.py"


def test_a_narrowing_that_no_longer_applies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module = generator()
    monkeypatch.setattr(module, "NARROWED", ((r"no such line", ""),))
    with pytest.raises(ValueError, match="no such line"):
        module.generate()


@pytest.mark.parametrize("name", aiocomm_native.__all__)
def test_hand_written_stub_has_the_members_of_the_type(name: str) -> None:
    kind = getattr(_core, name)
    body = next(
        node
        for node in ast.parse(BY_HAND.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ).body
    written = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    inherited = set(dir(tuple)) | {"n_fields", "n_sequence_fields", "n_unnamed_fields", "__match_args__"}
    inherited.add("__replace__")  # since Python 3.13
    found = set(vars(kind)) - IMPLIED - (inherited if issubclass(kind, tuple) else set())
    assert written == found


@pytest.mark.parametrize("name", aiocomm_native.__all__)
def test_public_members_of_the_stub_have_docstrings(name: str) -> None:
    for node in ast.walk(ast.parse(BY_HAND.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == name:
            assert ast.get_docstring(node)
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    assert ast.get_docstring(member), f"{name}.{member.name}"

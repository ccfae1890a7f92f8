"""The documentation knows every public name, error, page and example; its fragments of code are code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import aiocomm
from aiocomm import errors, links

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "pages"
TEXTS = [ROOT / "README.md", *sorted(PAGES.rglob("*.md"))]
PYTHON = re.compile(r"^( *)```python[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(page.read_text() for page in (PAGES / "reference").glob("*.md"))
    documented = set(re.findall(r"^::: aiocomm\.(\w+)$", text, re.MULTILINE))
    assert set(aiocomm.__all__) == documented


def test_every_error_says_what_must_be_rebuilt() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \|(?: [^|]+ \|){3}$", (PAGES / "reference/errors.md").read_text(), re.MULTILINE
    )
    branches = {"AiocommError", "PeerError", "UsageTypeError"}  # never raised themselves, or as their base
    assert set(rows) == set(errors.__all__) - branches | {"WorkerError"}


def test_every_page_is_in_the_navigation() -> None:
    nav = set(re.findall(r": (\S+\.md)$", (ROOT / "docs/mkdocs.yml").read_text(), re.MULTILINE))
    assert nav == {str(page.relative_to(PAGES)) for page in PAGES.rglob("*.md")}


def test_every_link_declares_what_it_can_do() -> None:
    for name in links.names():
        assert tuple(title for title, _ in links.capabilities(name).rows()) == links.CAPABILITY_ROWS


def test_a_new_link_is_known_by_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "__path__", [*links.__path__, str(ROOT / "examples" / "new_link")])
    assert "uds" in links.names()
    report = links.discover("uds")
    assert [check.state for check in report.checks] == [links.State.OK]
    assert not report.usable, "its C++ is not in this build: tests/native/new_link_test.cpp compiles it"
    assert links.capabilities("uds").reach == "processes of one host"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_code_compiles(path: Path) -> None:
    for indent, block in PYTHON.findall(path.read_text()):
        code = re.sub(f"^{indent}", "", block, flags=re.MULTILINE)
        if not code.startswith("--8<--"):
            compile(code, path.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_included_files_exist(path: Path) -> None:
    text = path.read_text()
    for name in re.findall(r'^--8<-- "([^":]+)', text, re.MULTILINE):
        assert (ROOT / name).is_file(), name
    # A formatter takes such a line in a block of Python for an expression, and no page shows the file then.
    assert not re.findall(r"^ *--8(?!<-- \").*", text, re.MULTILINE)


def test_examples_are_shown() -> None:
    shown = {name for path in TEXTS for name in re.findall(r'--8<-- "(examples/[^":]+)', path.read_text())}
    assert len(shown) >= 10


def test_the_readme_shows_a_tested_example() -> None:
    shown = PYTHON.findall((ROOT / "README.md").read_text())[0][1]
    assert shown == (ROOT / "examples" / "send_recv.py").read_text()


def test_the_readme_has_a_block_of_results() -> None:
    assert re.search(r"<!-- results -->\n.+<!-- /results -->", (ROOT / "README.md").read_text(), re.DOTALL)


def test_ci_runs_the_readme_s_second_command() -> None:
    commands = re.findall(r"^```sh\n(.+?) *(?:#.*)?\n```", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands[0] == "pip install . && aiocomm demo"
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == commands[1]

"""Code of the documentation runs.

A block with `title="name.py"` is a program; the next `sh` block runs it if it names it, else `python` does.
Blocks with `title="In [n]"` are cells: those of a page make one notebook. One with `title="fragment"` runs in
what `docs_fragments.py` has around it. All other blocks of Python include a file. The words after `aiocomm`
in `sh` blocks are read as that command reads them.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from docs_fragments import AROUND, NotRun, program
from notebooks import execute

from aiocomm import cli, links

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "pages"
EXAMPLE = ROOT / "examples" / "send_recv.py"  # which the README shows
TEXTS = [*sorted(PAGES.rglob("*.md")), ROOT / "README.md", ROOT / "bench" / "README.md"]
PYTHON = re.compile(r"^ *```[{ .]*python([^\n]*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r'^```(python|sh)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
TIMEOUT_S = 60


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Language, title and text of each block."""
    return BLOCK.findall(page.read_text())


def programs() -> list[tuple[Path, str, str, list[str]]]:
    """Page, file name, text and command of each program."""
    found = []
    for page in sorted(PAGES.rglob("*.md")):
        all_blocks = blocks(page)
        for index, (_, title, text) in enumerate(all_blocks):
            if title.endswith(".py"):
                following = next((shell for kind, _, shell in all_blocks[index + 1 :] if kind == "sh"), "")
                lines = [line for line in following.splitlines() if title in line]
                found.append((page, title, text, shlex.split(lines[0]) if lines else ["python", title]))
    return found


def notebooks() -> list[Path]:
    return [p for p in sorted(PAGES.rglob("*.md")) if any(t.startswith("In [") for _, t, _ in blocks(p))]


def fragments() -> list[tuple[str, str, str]]:
    """Page and number, text, and surroundings of each fragment that runs here."""
    found = []
    for page in sorted(PAGES.rglob("*.md")):
        texts = [text for _, title, text in blocks(page) if title == "fragment"]
        around = AROUND.get(page.stem, [])
        assert len(texts) == len(around), f"docs_fragments.py has not what is around those of {page.name}"
        for number, (text, there) in enumerate(zip(texts, around, strict=True), 1):
            if not isinstance(there, NotRun):
                found.append((f"{page.stem}-{number}", text, there))
    return found


def commands() -> list[list[str]]:
    """What the texts have people type after `aiocomm`."""
    shells = "".join(text for path in TEXTS for kind, _, text in blocks(path) if kind == "sh")
    return [shlex.split(line) for line in re.findall(r"(?:^|&& )aiocomm ([^#&|;>\n]*)", shells, re.MULTILINE)]


def test_there_is_something_to_run() -> None:
    assert len(programs()) >= 3
    assert len(notebooks()) >= 2
    assert len(commands()) >= 10


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: "-".join(path.relative_to(ROOT).parts))
def test_every_block_of_python_says_what_it_is(path: Path) -> None:
    for options, text in PYTHON.findall(path.read_text()):
        if text.startswith("--8<--") or text == EXAMPLE.read_text():
            continue
        assert re.fullmatch(r' title="([\w-]+\.py|In \[\d+\]|fragment)"', options), text


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_aiocomm_understands(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(links, "__path__", [*links.__path__, str(ROOT / "examples" / "new_link")])
    monkeypatch.chdir(tmp_path)
    Path("here.json").write_text('{"links": []}')  # what `aiocomm doctor --json` has printed
    monkeypatch.setattr(importlib.import_module(cli._COMMANDS[command[0]][0]), "main", lambda args: 0)
    assert cli.main(command) == 0


@pytest.mark.parametrize(("text", "around"), [pytest.param(t, a, id=i) for i, t, a in fragments()])
def test_fragment_runs(text: str, around: str, tmp_path: Path) -> None:
    whole = program(around, text).replace("tcp://10.0.0.1:7000", f"unix://{tmp_path}/meet")
    (tmp_path / "fragment.py").write_text(whole)
    run([sys.executable, "fragment.py"], tmp_path)


@pytest.mark.parametrize(
    ("page", "name", "text", "command"), programs(), ids=[name for _, name, _, _ in programs()]
)
def test_program_runs(page: Path, name: str, text: str, command: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    interpreter = {"python": [sys.executable], "aiocomm": [sys.executable, "-m", "aiocomm"]}[command[0]]
    run([*interpreter, *command[1:]], tmp_path)


def run(command: list[str], folder: Path) -> None:
    """Run a program, which says what it did, and has nothing to complain about."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert not done.stderr, done.stderr


USES = """
import asyncio
from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import aiocomm


async def main() -> None:
    async with aiocomm.connect(links="shm") as comm, comm.register(bytearray(8)) as region:
        send, recv = comm.send(b"x", 0), comm.recv(bytearray(1), 0)
        assert_type(await asyncio.gather(send, recv), tuple[None, aiocomm.Status])
        await asyncio.gather(*[send, recv])
        done, _ = await asyncio.wait([send, recv], timeout=1)
        await asyncio.wait_for(send, 1)
        for link in comm.links.values():
            await link.submissions().aclose()
            await link.completions().aclose()
        notes = comm.notifications()
        assert_type((await anext(notes)).payload, bytes)
        await notes.aclose()
        async for event in comm.events():
            assert_type(event, aiocomm.Event)
        assert_type(await comm.split(1), aiocomm.Group)
        assert_type(await comm.split(None), None)
        assert_type(aiocomm.empty(3, np.float64), NDArray[np.float64])
        assert_type(aiocomm.empty((2, 3)), NDArray[np.float32])
        await comm.exchange(region, 0)
"""


@pytest.mark.timeout(300)
def test_it_is_well_typed(tmp_path: Path) -> None:
    """All programs, the examples, and what else is said to work, for those who check their types."""
    pytest.importorskip("mypy")
    (tmp_path / "uses.py").write_text(USES)
    for _, name, text, _ in programs():
        (tmp_path / name).write_text(text)
    examples = [path for path in (PAGES.parents[1] / "examples").glob("*.py") if "gpu" not in path.name]
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "mypy", "--strict", "--follow-imports=silent"),
            *("--config-file=", f"--cache-dir={tmp_path}/cache"),
            *sorted(tmp_path.glob("*.py")),
            *examples,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", notebooks(), ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq", "ignore::DeprecationWarning:jupyter_client")
def test_cells_run(page: Path, tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(text) for _, title, text in blocks(page) if title.startswith("In [")]
    execute(nbformat.v4.new_notebook(cells=cells), tmp_path)

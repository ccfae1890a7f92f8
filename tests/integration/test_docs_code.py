"""Code of the documentation runs.

A block with `title="name.py"` is a program; the next `sh` block runs it if it names it, else `python` does.
Blocks with `title="In [n]"` are cells: those of a page make one notebook.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from notebooks import execute

PAGES = Path(__file__).resolve().parents[2] / "docs" / "pages"
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


def test_there_is_something_to_run() -> None:
    assert len(programs()) >= 3
    assert len(notebooks()) >= 2


@pytest.mark.parametrize(
    ("page", "name", "text", "command"), programs(), ids=[name for _, name, _, _ in programs()]
)
def test_program_runs(page: Path, name: str, text: str, command: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    interpreter = {"python": [sys.executable], "aiocomm": [sys.executable, "-m", "aiocomm"]}[command[0]]
    done = subprocess.run(
        [*interpreter, *command[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
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

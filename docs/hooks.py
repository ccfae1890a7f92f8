"""What MkDocs takes from the code: `{{ name }}` in a page is replaced by what that function returns."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import measured_gpu

import aiocomm
from aiocomm import cli
from aiocomm import links as known
from aiocomm.config import Settings
from aiocomm.links._report import is_built
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parent.parent
_NEED_DEVICES: Final = {"cuda": "none of its own", "rdma": "1 (tcp)"}  # not to be asked where there is none
_PLACE: Final = re.compile(r"^\{\{ (\w+) \}\}$", re.MULTILINE)
_OUTSIDE: Final = re.compile(r"\[([^\]]+)\]\((bench/[^)]*)\)")
_RESULTS: Final = re.compile(r"<!-- results -->\n(.*?)<!-- /results -->", re.DOTALL)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in a page's places."""
    own = (settings, commands, links, changelog, results)
    makers = {maker.__name__: maker for maker in (*own, *measured_gpu.MAKERS)}
    return _PLACE.sub(lambda place: makers[place[1]](), markdown)


def on_page_content(html: str, page: Page, **_: object) -> None:
    """Refuse a reference that lost methods, as when a class comes to inherit them."""
    if page.file.src_uri == "reference/communicator.md":
        public = [name for name in dir(aiocomm.Communicator) if not name.startswith("_")]
        if missing := [name for name in public if f'id="aiocomm.Communicator.{name}"' not in html]:
            raise ValueError(f"the reference lacks {', '.join(missing)} of Communicator")


def settings() -> str:
    """The settings, from their declaration."""
    rows = ((code(name), code(default), unit, doc) for name, default, unit, doc in Settings.reference())
    return table(("variable", "default", "unit", "meaning"), rows)


def commands() -> str:
    """The commands, from their parsers."""
    parts = []
    for name, (module, text) in cli._COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"aiocomm {name}")
        parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)
        implementation = importlib.import_module(module)
        implementation.add_arguments(parser)
        more = (implementation.__doc__ or "").partition("\n\n")[2].strip().replace(":\n1.", ":\n\n1.")
        parts.append(f"## aiocomm {name} {{: #{name} }}\n\n{text[0].upper()}{text[1:]}.\n\n{more}")
        parts.append(f"```text\n{parser.format_usage()}```")
        rows = [
            (code(spelling(action)), (action.help or "") % {"default": action.default})
            for action in parser._actions
            if not isinstance(action, argparse._HelpAction)
        ]
        parts.append(table(("argument", "meaning"), rows))
    return "\n\n".join(parts)


def links() -> str:
    """What each link can do: as it declares, and as the native module of this build says."""
    names = sorted(known.names(), key=lambda name: (not is_built(name), name))
    columns = [
        [
            "yes" if is_built(name) else "not in this build",
            *(value for _, value in known.capabilities(name).rows()),
            sockets(name),
        ]
        for name in names
    ]
    titles = ["in this version", *known.CAPABILITY_ROWS, "sockets per pair"]
    return table(["", *names], zip(titles, *columns, strict=True))


def sockets(link: str) -> str:
    """Sockets that a pair needs on a link."""
    if not is_built(link):
        return "-"
    if link in _NEED_DEVICES:
        return _NEED_DEVICES[link]
    engine = _core.Engine([link], *Settings().native_arguments())
    try:
        kind, count = engine.link_streams(link)
    finally:
        engine.close()
    return f"{count} ({kind})"


def changelog() -> str:
    """The fragments of what is not released, and the changelog."""
    released = (ROOT / "CHANGELOG.md").read_text().partition("<!-- towncrier -->")[2].strip()
    fragments = [path.read_text().strip() for path in sorted((ROOT / "docs/changelog.d").glob("*.*.md"))]
    coming = "\n".join(f"- {text}" for text in fragments)
    return f"## Not yet released\n\n{coming}\n\n{released}" if coming else released


def results() -> str:
    """The README's measured results; what it links to outside the pages is named instead."""
    found = _RESULTS.search((ROOT / "README.md").read_text())
    if found is None:
        raise ValueError("README.md has no <!-- results --> block")
    return _OUTSIDE.sub(r"\1 (`\2`)", found[1].strip())


def spelling(action: argparse.Action) -> str:
    """An argument as one types it."""
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return str(value)
    return ", ".join(action.option_strings) + (f" {value}" if action.nargs != 0 else "")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def code(text: str) -> str:
    """Code in a table's cell."""
    return f"`{text}`" if text else ""

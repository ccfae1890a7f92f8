"""Pages that MkDocs makes from the code, so that they cannot disagree with it."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mkdocs.structure.files import File

from aiocomm import cli, links
from aiocomm.config import Settings
from aiocomm.links import _report
from aiocomm_native import _core

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = re.compile(r"<!-- results -->\n(.*?)<!-- /results -->", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"settings": settings(), "cli": command_line(), "links": matrix(), "changelog": changelog()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the README's measured results where a page asks for them."""
    if "{{ results }}" not in markdown:
        return markdown
    found = RESULTS.search((ROOT / "README.md").read_text())
    if found is None:
        raise ValueError("README.md has no block of results")
    return markdown.replace("{{ results }}", found[1])


def settings() -> str:
    """The settings, from their declaration."""
    rows = [
        f"| `{variable}` | {code(default)} | {unit} | {cell(doc)} |"
        for variable, default, unit, doc in Settings.reference()
    ]
    head = (
        "# Settings\n\nRead from the environment when a communicator is opened. Sizes take suffixes (`64KiB`, "
        "`4M`, both binary), times too (`20us`, `1.5ms`, `2s`); without one they are bytes and seconds. A value "
        "that does not fit is a `UsageError` that names the variable.\n\n"
        "| variable | default | unit | meaning |\n|---|---|---|---|\n"
    )
    return (
        head
        + "\n".join(rows)
        + "\n\nBesides, `connect` reads `AIOCOMM_NAME`, `AIOCOMM_TOKEN` or `AIOCOMM_TOKEN_FILE`, and what the "
        "launcher sets: see [Launch](../howto/launchers.md).\n"
    )


def command_line() -> str:
    """The commands, from their parsers."""
    parts = [
        "# Command line\n\n`aiocomm COMMAND …`, also as `python -m aiocomm COMMAND …`. Exit status 2 is a wrong call."
    ]
    for name, (module, text) in cli._COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"aiocomm {name}")
        parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)
        implementation = importlib.import_module(module)
        implementation.add_arguments(parser)
        more = (implementation.__doc__ or "").partition("\n\n")[2].strip().replace(":\n1.", ":\n\n1.")
        parts.append(f"## aiocomm {name} {{: #{name} }}\n\n{text[0].upper()}{text[1:]}.\n\n{more}")
        parts.append(f"```text\n{parser.format_usage()}```")
        rows = [
            f"| {code(names(action))} | {cell((action.help or '') % arguments(action))} |"
            for action in parser._actions
            if not isinstance(action, argparse._HelpAction)
        ]
        parts.append("| argument | meaning |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def matrix() -> str:
    """What each link can do: from its declaration, and from the native module of this build."""
    rows: dict[str, list[str]] = {name: [] for name in links.CAPABILITY_ROWS}
    names = sorted(links.names(), key=lambda name: (not _report.is_built(name), links.names().index(name)))
    for name in names:
        for row, value in links.capabilities(name).rows():
            rows[row].append(value)
    header = ["| |", *(f" {name} |" for name in names)]
    built = ["| in this version |", *(" yes |" if _report.is_built(n) else " planned |" for n in names)]
    sockets = ["| sockets per pair |", *(f" {streams(n)} |" for n in names)]
    lines = ["".join(header), "|---" * (len(names) + 1) + "|", "".join(built)]
    lines += [f"| {row} | " + " | ".join(map(cell, values)) + " |" for row, values in rows.items()]
    lines.append("".join(sockets))
    return (
        "# Links\n\nThe cheapest link that works for both processes carries their messages; `AIOCOMM_LINKS` and "
        "`connect(links=…)` restrict the choice. Messages to one's own rank go over `self`, inside the process. "
        "`aiocomm doctor` tells what the machine at hand can do, and what to install.\n\n"
        + "\n".join(lines)
        + "\n\nPaths, as statistics count them: `eager`, the bytes ride with the header and are copied in and out; "
        "`mapped`, one copy between shared segments; `cma`, one copy by cross-memory attach "
        "(`process_vm_readv`); `stream`, chunk by chunk through the ring or the sockets.\n"
    )


def streams(link: str) -> str:
    """Sockets that a pair needs on a link."""
    if not _report.is_built(link):
        return "–"
    native = Settings().native()
    numbers = {key: float(value) for key, value in native.items() if not isinstance(value, str)}
    engine = _core.Engine([link], numbers, {})
    try:
        kind, count = engine.link_streams(link)
    finally:
        engine.close()
    return f"{count} × {kind}" if count else "none"


def changelog() -> str:
    """The changelog, and the fragments of what is not released."""
    released = (ROOT / "CHANGELOG.md").read_text().partition("<!-- towncrier -->")[2].strip()
    fragments = sorted((ROOT / "docs/changelog.d").glob("*.*.md"))
    coming = "\n".join(f"- {path.read_text().strip()}" for path in fragments)
    parts = ["# Changelog"]
    if coming:
        parts.append(f"## Not yet released\n\n{coming}")
    return "\n\n".join([*parts, released]) + "\n"


def names(action: argparse.Action) -> str:
    """An argument as one types it."""
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return str(value)
    return ", ".join(action.option_strings) + (f" {value}" if action.nargs != 0 else "")


def arguments(action: argparse.Action) -> dict[str, object]:
    """What the help text may refer to."""
    return {"default": action.default, "prog": "aiocomm"}


def code(text: str) -> str:
    """Code in a table's cell."""
    return "`" + text.replace("|", "\\|") + "`" if text else ""


def cell(text: str) -> str:
    """Text in a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")

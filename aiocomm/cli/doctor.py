"""`aiocomm doctor`: what this machine can do per link, why not, and what to install.

Exit status 0 if the links asked for work (`--require shm,tcp`; by default either of these is enough) and the
`AIOCOMM_` settings of this environment can be used, else 1.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import sysconfig
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aiocomm import links
from aiocomm.config import Settings, unknown_variables
from aiocomm.errors import AiocommError
from aiocomm.link import check_links
from aiocomm.links import Check, Report, State
from aiocomm.links._report import package_version

if TYPE_CHECKING:
    import argparse

__all__ = ["add_arguments", "main"]

_MARKS = {
    State.OK: "[green]ok[/]",
    State.LIMITED: "[yellow]limited[/]",
    State.FAILED: "[red]no[/]",
    State.INFO: "",
}
_ENOUGH = ("shm", "tcp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `aiocomm doctor`."""
    parser.add_argument(
        "--require",
        metavar="LINKS",
        type=_link_names,
        help="comma-separated links that must work for exit status 0 (default: either of shm and tcp)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--against",
        metavar="FILE",
        type=_other_host,
        help="what --json printed on another host: also tell whether the two get on (rdma)",
    )


def main(args: argparse.Namespace) -> int:
    """Look, print, and return the exit status."""
    reports = sorted((links.discover(name) for name in links.names()), key=lambda r: (not r.built, r.link))
    usable = {report.link for report in reports if report.usable}
    enough = usable.issuperset(args.require) if args.require else bool(usable.intersection(_ENOUGH))
    settings = _settings()
    ok = enough and not settings["error"]
    if args.against is not None:
        reports = [_with_comparison(report, args.against) for report in reports]
    if args.json:
        found = {
            "ok": ok,
            "required": list(args.require or ()),
            "python": _python(),
            "settings": settings,
            "links": [{**dataclasses.asdict(report), "usable": report.usable} for report in reports],
        }
        print(json.dumps(found, indent=2))
    else:
        console = Console(highlight=False)
        _show(console, reports, settings)
        if not enough:
            needed = " and ".join(args.require) if args.require else " or ".join(_ENOUGH)
            console.print(f"\n[red]not enough:[/] {needed} must work")
    return 0 if ok else 1


def _link_names(text: str) -> tuple[str, ...]:
    wanted = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = set(wanted) - set(links.names())
    if unknown or not wanted:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(
            f"{', '.join(sorted(unknown)) or 'nothing'}: not among {', '.join(links.names())}"
        )
    return wanted


def _other_host(path: str) -> dict[str, dict[str, Any]]:
    """Facts by link of what `--json` printed elsewhere."""
    from argparse import ArgumentTypeError

    try:
        with open(path, encoding="utf-8") as file:
            return {link["link"]: dict(link["facts"]) for link in json.load(file)["links"]}
    except OSError as error:
        raise ArgumentTypeError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentTypeError(f"{path} is not what `aiocomm doctor --json` printed: {error}") from error


def _with_comparison(report: Report, theirs: dict[str, dict[str, Any]]) -> Report:
    try:
        compared = links.compare(report.link, theirs.get(report.link, {}))
    except ValueError as error:
        compared = [Check("peer", State.INFO, f"nothing to compare with: {error}")]
    return dataclasses.replace(report, checks=(*report.checks, *compared))


def _python() -> dict[str, Any]:
    """The interpreter and what is installed beside it."""
    threading = "off"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        threading = "built, but the GIL is enabled" if getattr(sys, "_is_gil_enabled", bool)() else "on"
    return {
        "aiocomm": package_version("aiocomm"),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "free_threading": threading,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "numpy": package_version("numpy"),
        "uvloop": package_version("uvloop"),
        "trio": package_version("trio"),
    }


def _settings() -> dict[str, Any]:
    """What `connect` would make of this environment: its error, and variables that mean nothing."""
    error = ""
    try:
        check_links(Settings.from_environment().links or ())
    except AiocommError as refused:
        error = str(refused)
    unknown = [{"name": name, "meant": meant} for name, meant in unknown_variables()]
    return {"error": error, "unknown": unknown}


def _show(console: Console, reports: list[Report], settings: dict[str, Any]) -> None:
    facts = _python()
    versions = [f"{name} {facts[name] or 'missing'}" for name in ("aiocomm", "numpy", "uvloop", "trio")]
    console.print(f"{facts['implementation']} {facts['python']}, {facts['system']}, {facts['cores']} cores")
    console.print(f"{', '.join(versions)}, free threading {facts['free_threading']}")
    if settings["error"]:
        console.print(f"[red]settings:[/] {escape(settings['error'])}")
    for variable in settings["unknown"]:
        meant = f": {variable['meant']}?" if variable["meant"] else ""
        console.print(f"[yellow]settings:[/] {escape(variable['name'])} means nothing{meant}")
    for report in reports:
        console.print(f"\n[bold]{report.link}[/] {_state(report)}: {escape(report.summary)}")
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for check in report.checks:
            advice = f"\n[cyan]{escape(check.advice)}[/]" if check.advice else ""
            table.add_row(f"  {escape(check.name)}", _MARKS[check.state], escape(check.detail) + advice)
        console.print(table)


def _state(report: Report) -> str:
    if not report.built:
        return "[dim]not in this build[/]"
    return "[green]works[/]" if report.usable else "[red]does not work[/]"

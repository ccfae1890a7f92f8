"""Notebooks that run as a user's do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbclient import NotebookClient
from traitlets.config import Config

if TYPE_CHECKING:
    from pathlib import Path

    from nbformat import NotebookNode

__all__ = ["execute"]

_TIMEOUT_S: Final = 60


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells; outputs are put into the notebook.

    Its kernel is spoken to by sockets in the folder: of the ports that are looked for before it starts, which
    is the default, others may be given one meanwhile.
    """
    config = Config({"KernelManager": {"transport": "ipc", "ip": str(folder / "kernel")}})
    NotebookClient(notebook, timeout=_TIMEOUT_S, kernel_name="python3", config=config).execute()

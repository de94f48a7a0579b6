"""What the main job prints: one console, and nothing that others print without need."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["console", "key_values", "quieten", "say"]

# A file or a pipe has no width of its own: 100 columns hold every line of ours.
console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)


def say(text: str) -> None:
    """Print one line of what is being done."""
    console.print(text, markup=False)


def key_values(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print what was decided: names on the left, values on the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.HORIZONTALS)
    table.show_header = False
    table.pad_edge = False
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def quieten() -> None:
    """Keep from the terminal what a user of this program could not act on, one by one."""
    # Lightning has a handler of its own for "GPU available: False" and advertisements. What it logs
    # goes to the handlers of the root logger as well: to run.log, and to the terminal from warnings
    # on.
    logging.getLogger("lightning").handlers.clear()
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


_KNOWN_WARNINGS = (
    # Lightning's use of PyTorch's internals, mended in a later release of either.
    r".*isinstance\(treespec, LeafSpec\).*",
    # Of a few images: every epoch is logged all the same.
    r"The number of training batches .* is smaller than the logging interval",
    # Both stages write into one folder, on purpose.
    r"Checkpoint directory .* exists and is not empty",
)

"""What every command shares: consoles, errors, progress, common arguments, and figures in words."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from blocksparse import whole_file

PIPE_WIDTH = 200  # columns where the output is a file or a pipe: nothing is cut off


class CommandError(Exception):
    """Work that could not be done, with a message for the person at the keyboard."""


class UsageError(CommandError):
    """A command that cannot be used as it was typed, such as a file that is not there."""


def console() -> Console:
    """Return the console of standard output, which reads no markup into names."""
    return _console(stderr=False)


def error_console() -> Console:
    """Return the console of standard error, for errors and progress."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(
        stderr=stderr,
        width=None if terminal else PIPE_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    """Return an empty table; the columns named in `right` hold figures and are set right."""
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        grid.add_column(
            name, justify="right" if name in right else "left", overflow="fold", no_wrap=False
        )
    return grid


@contextmanager
def progress(title: str, steps: float | None = None) -> Iterator[Progress]:
    """Show a progress bar on standard error while a piece of work runs.

    Parameters
    ----------
    title : str
        What is being done.
    steps : float, optional
        How many there are; without, the bar only shows that something happens.
    """
    display = error_console()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=display,
        transient=True,
        disable=not display.is_terminal,
    )
    with bar:
        bar.add_task(title, total=steps)
        yield bar


def advance_to(bar: Progress, share: float) -> None:
    """Move the one task of a bar from :func:`progress` to `share` of its steps, 0..1."""
    task = bar.tasks[0]
    bar.update(task.id, completed=share * (task.total or 0.0))


def existing_file(text: str) -> Path:
    """Return the path if a file is there.

    Raises
    ------
    UsageError
        If there is none, naming the model files that lie next to it.
    """
    path = Path(text)
    if not text:
        raise UsageError("the model file has an empty name; is a variable of the shell empty?")
    if path.is_file():
        return path
    if path.is_dir():
        folder, problem = path, f"{text} is a folder, not a model file"
    else:
        folder, problem = path.parent, f"there is no file {text}"
    found = sorted(folder.glob("*.bsr.safetensors"))[:3] if folder.is_dir() else []
    hint = "`python train.py` and `python export.py` write model files, *.bsr.safetensors"
    if found:
        hint = f"did you mean {' or '.join(map(str, found))}?"
    raise UsageError(f"{problem}; {hint}")


def add_file_argument(parser: argparse.ArgumentParser) -> None:
    """Add the model file that every command takes."""
    parser.add_argument("file", metavar="FILE", help="a model file, *.bsr.safetensors")


def add_threads_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses the number of threads."""
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="threads to compute with (default: one per core that this process may use)",
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose threads and engine."""
    add_threads_argument(parser)
    parser.add_argument(
        "--engine",
        choices=("auto", "compiled", "reference"),
        default="auto",
        help="compiled kernels, the slow NumPy reference, or the best that runs here (default)",
    )


def positive(text: str) -> int:
    """Parse an integer of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def positives(text: str) -> list[int]:
    """Parse whole numbers of at least 1 with commas between them, for argparse."""
    return [positive(part) for part in text.split(",")]


def one_line(text: str) -> str:
    """Return text from a file or an error fit for one line of a terminal.

    Line breaks become blanks; control characters, which could steer the terminal, become escapes.
    """
    flat = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in flat)


def bytes_text(count: int) -> str:
    """Return a number of bytes with its unit: ``812 B``, ``4.11 MB`` (decimal prefixes)."""
    return _scaled(count, {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1})


def count_text(count: float) -> str:
    """Return a count in three digits: ``812``, ``4.11 million``."""
    return _scaled(count, {"billion": 1e9, "million": 1e6, "thousand": 1e3, "": 1}).rstrip()


def _scaled(count: float, units: dict[str, float]) -> str:
    unit, size = next(
        ((unit, size) for unit, size in units.items() if count >= size), list(units.items())[-1]
    )
    value = count / size
    digits = 0 if size == 1 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def percent(share: float) -> str:
    """Return a share in 0..1 as percent with one decimal."""
    return f"{100 * share:.1f} %"


def json_text(tree: Any) -> str:
    """Return `tree` as JSON, indented, ending in a newline."""
    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_target(path: Path | None) -> None:
    """Say before the work that a file cannot be written, not after it.

    Raises
    ------
    UsageError
        If it is a folder, or has no folder to go to, or none that may be written to.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        whole_file.check_place(path)
    except OSError as error:
        raise UsageError(str(error)) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all, into a folder that is there.

    Raises
    ------
    UsageError
        See `check_target`.
    CommandError
        If it cannot be written all the same.
    """
    check_target(path)
    try:
        whole_file.write_whole(path, text)
    except OSError as error:  # it names the draft, which is gone
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error

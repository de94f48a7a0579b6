"""A piece of work that takes seconds: announced, with a progress bar, and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import Progress

from blocksparse.cli import console as ui

say = ui.error_console().print


@contextmanager
def loading_pytorch() -> Iterator[None]:
    """Announce the imports within, which take seconds.

    Raises
    ------
    UsageError
        If a library that they need is not installed.
    """
    say("loading PyTorch")
    try:
        yield
    except ImportError as error:
        raise ui.UsageError(
            f"this script prepares networks with PyTorch, and a library that this needs is missing "
            f'({error}); add it with: pip install -e ".[bench]"'
        ) from error


@dataclass
class Stage:
    """One piece of work.

    Attributes
    ----------
    seconds : float
        What it took; known when it is over.
    """

    bar: Progress
    seconds: float = field(default=0.0, init=False)

    def step(self, share: float) -> None:
        """Show that a share of the work is done, 0..1."""
        ui.advance_to(self.bar, share)


@contextmanager
def stage(title: str, steps: bool = True) -> Iterator[Stage]:
    """Announce work, and show a bar on a terminal while it runs.

    Parameters
    ----------
    title : str
        What is done.
    steps : bool
        Whether `Stage.step` will be called; without, the bar only shows that something happens.
    """
    start = time.perf_counter()
    say(title)
    with ui.progress("", steps=1.0 if steps else None) as bar:
        current = Stage(bar)
        try:
            yield current
        finally:
            current.seconds = time.perf_counter() - start

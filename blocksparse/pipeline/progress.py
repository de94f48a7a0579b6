"""Progress bars for a whole stage or scan, and one line now and then without a terminal.

Lightning's own bars count the batches of one epoch. A stage of many short epochs then flickers, and
says nothing about when it will end.
"""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from blocksparse.pipeline.console import console as shared_console

__all__ = ["StageProgress", "Steps"]

# Where there is no terminal to redraw, this many lines are printed per stage.
LINES = 5
# Logged figures that are shares, 0..1, by a word in their names.
SHARES = ("accuracy", "sparsity", "density")


class StageProgress(ProgressBar):
    """One bar from the first step of a stage to its last, with the logged figures behind it.

    Whatever is logged with ``prog_bar=True`` is shown; shares (accuracy, sparsity, density) as
    percentages, under the last part of their names.

    Parameters
    ----------
    console
        Where to draw; the terminal of the pipeline by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or shared_console
        self.title = "training"
        self._enabled = True
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._started = 0.0
        self._next_line = 0.0

    def disable(self) -> None:
        """Draw nothing, as Lightning asks on all but the first process."""
        self._enabled = False

    def enable(self) -> None:
        """Draw again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without breaking the bar."""
        self.console.print(*args, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar at the step the stage starts or goes on from."""
        self._started = time.perf_counter()
        self._next_line = 0.0
        if not self._enabled:
            return
        if not self.console.is_terminal:
            self._line(f"starts at {_epochs(trainer)}")  # the end of the first may be hours away
            return
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),  # what the rest leaves of the line
            TextColumn("{task.fields[epoch]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}", style="cyan", table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            console=self.console,
            expand=True,
        )
        self._task = self._progress.add_task(
            self.title,
            total=_total_steps(trainer),
            completed=trainer.global_step,
            epoch=_epochs(trainer),
            figures="",
        )
        self._progress.start()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move the bar on."""
        if self._progress is not None:
            self._progress.update(
                self._task,
                completed=trainer.global_step,
                epoch=_epochs(trainer),
                figures=_figures(trainer),
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the figures of the epoch: in the bar, or as a line every so often."""
        if self._progress is not None:
            self._progress.update(self._task, figures=_figures(trainer))
            return
        done = (trainer.current_epoch + 1) / max(trainer.max_epochs or 1, 1)
        if not self._enabled or done < self._next_line:
            return
        self._next_line = (int(done * LINES) + 1) / LINES if done < 1 else 1.0
        seconds = time.perf_counter() - self._started
        self._line(f"{_epochs(trainer)}  {_figures(trainer)}  {seconds:.0f} s")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar, and leave it on the screen."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the error is readable and the next run can open its own."""
        self._close()

    def _line(self, text: str) -> None:
        self.console.print(f"{self.title}: {text}", markup=False, highlight=False, soft_wrap=True)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _total_steps(trainer: pl.Trainer) -> float | None:
    """Optimizer steps in the whole stage, or None where there is no end."""
    total = trainer.estimated_stepping_batches
    return None if total in (float("inf"), -1) else float(total)


def _epochs(trainer: pl.Trainer) -> str:
    epoch = trainer.current_epoch + 1
    return f"epoch {epoch}/{trainer.max_epochs}"


def _figures(trainer: pl.Trainer) -> str:
    """Return what was logged for the bar, as ``loss 0.123  accuracy 97.1 %``."""
    return "  ".join(
        f"{name.rpartition('/')[2]} {_figure(name, float(value))}"
        for name, value in trainer.progress_bar_metrics.items()
        if isinstance(value, (int, float)) and not name.endswith(("_step", "_epoch"))
    )


def _figure(name: str, value: float) -> str:
    if any(word in name for word in SHARES):
        return f"{100 * value:.1f} %"
    return f"{value:.3f}"


class Steps:
    """A bar over a known number of steps; one line now and then where there is no terminal.

    Parameters
    ----------
    title
        What is being done.
    total
        How many steps there are.
    done
        How many of them were done before.
    console
        Where to draw; the terminal of the pipeline by default.
    """

    def __init__(
        self, title: str, total: int, done: int = 0, console: Console | None = None
    ) -> None:
        self.title = title
        self.total = total
        self.done = done
        self.console = console or shared_console
        self._started = time.perf_counter()
        self._first = done
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[what]}", style="cyan", table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            console=self.console,
            expand=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, what="")

    def __enter__(self) -> Steps:
        """Show the bar."""
        self._progress.start()
        if not self.console.is_terminal:
            self._line(f"{self.done} of {self.total} done before" if self.done else "starts")
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the bar, and leave it on the screen."""
        self._progress.stop()

    def step(self, what: str) -> None:
        """Count one step more, and show what was done in it."""
        self.done += 1
        self._progress.update(self._task, completed=self.done, what=what)
        lines = LINES * self.done // self.total
        if not self.console.is_terminal and lines > LINES * (self.done - 1) // self.total:
            seconds = time.perf_counter() - self._started
            left = seconds * (self.total - self.done) / (self.done - self._first)
            self._line(f"{self.done}/{self.total}  {what}  {seconds:.0f} s, {left:.0f} s to go")

    def _line(self, text: str) -> None:
        self.console.print(f"{self.title}: {text}", markup=False, highlight=False, soft_wrap=True)

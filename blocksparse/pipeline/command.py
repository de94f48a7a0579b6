"""The command a run was started with, as a report gives it: what makes the result, and no more."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

__all__ = ["command_line"]

# What says where things are, or how a run is carried out, with all keys and choices below. Of
# `trainer`, only what leaves the result alone: precision, fewer batches, or more devices, each of
# which takes a batch, make another network. So may callbacks.
LEFT_OUT = (
    "hydra",
    "paths",
    "resume",
    "threads",
    "report",
    "logger",
    "trainer.accelerator",
    "trainer.log_every_n_steps",
    "trainer.check_val_every_n_epoch",
    "trainer.limit_val_batches",
    "data.num_workers",
)


def command_line(overrides: Sequence[str]) -> str:
    """Return the command of a run, quoted for a shell.

    Parameters
    ----------
    overrides
        What was typed after ``python train.py``; in a sweep, what this job was given.

    Returns
    -------
    str
        Such as ``python train.py experiment=x seed=1``. A value that is an absolute path is
        shortened to its last part.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    kept = [_portable(override) for override in parsed if not _is_left_out(override)]
    return shlex.join(["python", "train.py", *kept])


def _is_left_out(override: Override) -> bool:
    key = override.key_or_group
    return any(key == name or key.startswith((f"{name}.", f"{name}/")) for name in LEFT_OUT)


def _portable(override: Override) -> str:
    """Return an override as it was typed, an absolute path shortened to its last part."""
    assert override.input_line is not None  # it was parsed from a text
    key, _, value = override.input_line.partition("=")
    quote = value[0] if value[:1] in ("'", '"') else ""
    path = value.strip(quote) if quote else value
    if not (path.startswith("~") or Path(path).is_absolute()):
        return override.input_line
    return f"{key}={quote}{Path(path).name}{quote}"

"""What Hydra calls: one job of a run or a sweep, with errors a person can read."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError
from rich.text import Text

from blocksparse.pipeline import allocate_job, scan_job
from blocksparse.pipeline.command import command_line
from blocksparse.pipeline.console import console
from blocksparse.pipeline.folders import STAGES, RunFolder, resume_point
from blocksparse.pipeline.job import run
from blocksparse.pipeline.setup import is_first_process
from blocksparse.pipeline.values import check_added

__all__ = ["run_job"]

_log = logging.getLogger(__name__)

# What may be changed when a run goes on, with all keys below. None of it changes what is learned
# but the number of devices, each of which takes a batch.
FREE_KEYS = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.log_every_n_steps",
    "trainer.limit_val_batches",
    "callbacks",
    "logger",
    "report",
    "data.root",
    "data.num_workers",
    "sparsity.allocation.path",
)
# What PyTorch puts before the text of an error in a process that loads data: its whole traceback.
_WORKERS = re.compile(r"\ACaught \w+ in DataLoader worker .*\n\w+: ", re.DOTALL)
# Errors whose text is meant for the user; everything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, OSError, MisconfigurationException)


def run_job(cfg: DictConfig) -> float:
    """Run one Hydra job.

    Parameters
    ----------
    cfg
        The composed configuration. With ``resume`` set, the configuration saved in that run counts,
        and of this one only what was given on the command line.

    Returns
    -------
    float
        Validation accuracy of the exported file, 0..1: what a sweeper maximises. Of other tasks
        than training, see `scan_job.run` and `allocate_job.run`.
    """
    hydra = HydraConfig.get()
    folder = RunFolder(Path(hydra.runtime.output_dir))
    single = hydra.mode == RunMode.RUN
    # Whether all that may lie in the folder later is this job's own.
    is_new = cfg.resume is None and not folder.config.exists() and is_first_process()
    _log.info("overrides: %s", " ".join(hydra.overrides.task) or "none")
    try:
        devices = OmegaConf.select(cfg, "trainer.devices", default=1)
        if not single and devices not in (1, "auto"):
            raise ValueError(
                f"trainer.devices={devices}: a sweep (-m, --multirun) trains on one "
                "device; start its runs one by one, or leave trainer.devices at 1"
            )
        checkpoint = command = None
        if cfg.resume is not None:
            if not single:
                raise ValueError("resume= goes on with one run: leave out -m (--multirun)")
            folder, checkpoint = resume_point(str(cfg.resume))
            cfg = resumed_config(folder, hydra.overrides.task, hydra.runtime.choices)
        elif folder.config.exists() and is_first_process():
            raise FileExistsError(
                f"{folder} already holds a run. Go on with it by resume={folder}, or "
                "start another with another name=... or another moment"
            )
        else:
            check_added(cfg, hydra.overrides.task)
            command = command_line(hydra.overrides.task)
        return _run_task(cfg, folder, checkpoint, command)
    except (KeyboardInterrupt, SystemExit):
        if _can_go_on(folder):
            console.print(f"Interrupted. Go on with: python train.py resume={folder}")
        raise
    except USER_ERRORS as error:
        _log.info("traceback", exc_info=True)
        # The system's own words, such as for a full disk, may not say where.
        nameless = isinstance(error, OSError) and error.errno and not error.filename
        text = f"{error}, writing to {folder}" if nameless else _WORKERS.sub("", str(error)).strip()
        console.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)
        if not folder.remove_unstarted(is_new):
            console.print(f"The traceback is in {folder}/run.log", style="dim", soft_wrap=True)
            if isinstance(error, OSError) and _can_go_on(folder):  # such as a full disk
                console.print(f"When that is mended: python train.py resume={folder}")
        if single:
            sys.exit(1)
        raise  # Hydra goes on with the other jobs of the sweep, and reports this one at the end


def _run_task(
    cfg: DictConfig, folder: RunFolder, checkpoint: Path | None, command: str | None
) -> float:
    """Run what ``task=`` names, and return its figure for sweepers."""
    name = OmegaConf.select(cfg, "task.name", default="train")  # older runs have no task
    if name == "train":
        report = run(cfg, folder, checkpoint, command)
        return report.accuracy.runtime if report else 0.0
    if name == "sensitivity":
        return scan_job.run(cfg, folder)
    if name == "allocate":
        return allocate_job.run(cfg, folder)
    raise ValueError(f"task.name={name}: choose task=train, task=sensitivity or task=allocate")


def _can_go_on(folder: RunFolder) -> bool:
    """Whether a run left something to go on from."""
    return any(path.exists() for path in (*map(folder.last, STAGES), folder.scan))


def resumed_config(
    folder: RunFolder, overrides: Sequence[str], groups: Collection[str]
) -> DictConfig:
    """Return the configuration a run was started with, with what may be changed changed.

    Parameters
    ----------
    folder
        The run.
    overrides
        What was given on the command line, ``resume=`` included.
    groups
        Names of the configuration groups.

    Raises
    ------
    ValueError
        If an override would make it another run, or its key is not in the configuration.
    """
    cfg = folder.read_config()
    OmegaConf.set_struct(cfg, True)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key == "resume":
            continue
        if key in groups or not _is_free(key):
            raise ValueError(
                f"{override.input_line}: a run that goes on keeps the configuration it was started "
                f"with ({folder.config}). Leave it out; only these may change: "
                + ", ".join(FREE_KEYS)
            )
        try:
            OmegaConf.update(cfg, key, override.value(), force_add=override.is_add())
        except ConfigAttributeError as error:
            raise ValueError(
                f"{override.input_line}: {folder.config} has no such key. Mend its name, or add it "
                f"with +{override.input_line}"
            ) from error
    return cfg


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)

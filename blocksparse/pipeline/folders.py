"""What lies where in the folder of a run, and which folder a resumed run goes on in.

Nothing here imports torch, so that ``python train.py --help`` answers at once.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

__all__ = ["STAGES", "RunFolder", "register_resolvers", "resume_point"]

STAGES = ("dense", "sparse")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside ``runs/<name>/<time>/``.

    Parameters
    ----------
    path
        The folder itself.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, as YAML."""
        return self.path / "config.yaml"

    @property
    def command(self) -> Path:
        """The command the run was started with; runs of earlier versions have none."""
        return self.path / "command.txt"

    def __str__(self) -> str:
        """Return the path as one would type it here."""
        here = Path.cwd()
        return str(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)

    def read_config(self) -> DictConfig:
        """Read the configuration the run was started with.

        Raises
        ------
        ValueError
            If it is damaged.
        """
        try:
            config = OmegaConf.load(self.config)
        except Exception as error:  # those of YAML's parser, of OmegaConf, of text that is none
            raise ValueError(f"{self.config}: is damaged: {error}") from error
        if not isinstance(config, DictConfig) or not config:
            raise ValueError(
                f"{self.config}: is damaged, it is not the configuration of a run; take that of a "
                "run with the same command, or start anew"
            )
        return config

    @property
    def model(self) -> Path:
        """The exported file."""
        return self.path / "model.bsr.safetensors"

    @property
    def scan(self) -> Path:
        """The rows of a sensitivity scan; it exists once there is one."""
        return self.path / "sensitivity.csv"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, stage: str) -> Path:
        """Return where the finished weights of a stage lie; it exists once the stage is done."""
        return self.checkpoints / f"{stage}.ckpt"

    def last(self, stage: str) -> Path:
        """Return where the state of a stage under way lies, optimizer and masks included."""
        return self.checkpoints / f"last_{stage}.ckpt"

    def log_version(self, stage: str) -> str:
        """Return a name for a fresh folder below ``logs/``: the stage, numbered when resumed."""
        attempt, name = 1, stage
        while (self.path / "logs" / name).exists():
            attempt += 1
            name = f"{stage}_{attempt}"
        return name

    def contents(self) -> dict[str, str]:
        """Return what a finished run leaves: path relative to the folder -> a few words on it."""
        permuted = (self.path / "permutation.json").exists()
        order = {"permutation.md, .json": "what each layer gained by the order of its channels"}
        typed = {self.command.name: "the command, without what only this machine needs"}
        return {
            self.model.name: "the network, for blocksparse.load",
            "report.md, report.json": "the table above",
            "config.yaml": "the whole configuration",
            **(typed if self.command.exists() else {}),
            "sparsity_plan.md, .json": "what was pruned, layer by layer",
            **(order if permuted else {}),
            "checkpoints/": "dense and sparse weights; states to resume from",
            "logs/": "metrics.csv, and for tensorboard --logdir runs",
            "run.log": "everything that was logged",
        }

    def remove_unstarted(self, is_new: bool) -> bool:
        """Remove the folder of a run that never began, and say whether it is gone.

        Hydra makes it before the configuration is looked at; what was asked for, and a log, are
        nothing to keep of a run that is new.

        Parameters
        ----------
        is_new
            Whether configuration and command, where they are there, are this run's own.
        """
        path = self.path.resolve()
        here = Path.cwd()
        if not path.is_dir() or path == here or path in here.parents:
            return False
        asked = {self.config.name, self.command.name} if is_new else set()
        if {entry.name for entry in path.iterdir()} - {"run.log", ".hydra"} - asked:
            return False
        for handler in logging.getLogger().handlers:
            written = handler.baseFilename if isinstance(handler, logging.FileHandler) else None
            if written and path in Path(written).parents:
                handler.close()
        shutil.rmtree(path)
        with suppress(OSError):  # not empty
            for parent in path.parents[:2]:  # runs/<name>, runs
                if parent != here:
                    parent.rmdir()
        return True


def resume_point(target: str | Path) -> tuple[RunFolder, Path | None]:
    """Find the run that `target` belongs to.

    Parameters
    ----------
    target
        The folder of a run, or one of the checkpoints in it.

    Returns
    -------
    RunFolder, Path or None
        The run, and the checkpoint where `target` names one.

    Raises
    ------
    FileNotFoundError
        If there is no such path, or no run there.
    """
    path = Path(target).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"resume={target}: no such file or folder. Name the folder of a run, such as "
            "runs/<name>/<time>, or one of the files in its checkpoints folder"
        )
    checkpoint = path if path.is_file() else None
    folder = RunFolder(path.resolve().parent.parent if checkpoint else path)
    if not folder.config.is_file():
        raise FileNotFoundError(
            f"resume={target}: {folder.path} has no config.yaml, so it is not the folder of a run. "
            "Name the folder below runs/<name>/ that holds config.yaml and checkpoints/"
        )
    if checkpoint and checkpoint.resolve() not in {
        folder.last(stage).resolve() for stage in STAGES
    } | {folder.checkpoint("dense").resolve()}:
        raise FileNotFoundError(
            f"resume={target}: not a checkpoint that a run goes on from; those are "
            + ", ".join(str(folder.last(stage)) for stage in STAGES)
            + f" and {folder.checkpoint('dense')}"
        )
    return folder, checkpoint


def _run_folder(resume: str | int | None, runs: str, name: str | int, time: str) -> str:
    # Where there is nothing to go on from, or a name is none, the job says so, better than a
    # resolver can.
    with suppress(FileNotFoundError):
        if resume is not None:
            return str(resume_point(str(resume))[0].path)
    return str(Path(runs) / str(name) / time)


def register_resolvers() -> None:
    """Teach OmegaConf ``${run_folder:resume,runs,name,time}``, used by configs/hydra."""
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)

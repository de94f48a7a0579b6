"""The two trainings: dense, then sparse; each can be skipped when done, or gone on with."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from torch import nn

from blocksparse.pipeline.console import say
from blocksparse.pipeline.folders import RunFolder
from blocksparse.pipeline.progress import StageProgress
from blocksparse.pipeline.setup import build, is_first_process, is_set
from blocksparse.training import Classifier, ImageData
from blocksparse.training.weights import check_whole
from blocksparse.whole_file import draft_of

__all__ = ["TITLES", "Stage", "save_weights"]

_log = logging.getLogger(__name__)

TITLES = {"dense": "training", "sparse": "pruning"}


class Stage:
    """One training with its own optimizer, logs and checkpoints.

    Parameters
    ----------
    cfg
        The whole configuration.
    name
        ``"dense"`` or ``"sparse"``.
    folder
        Where everything goes.
    """

    def __init__(self, cfg: DictConfig, name: str, folder: RunFolder) -> None:
        self.cfg = cfg
        self.name = name
        self.folder = folder
        self.options = cfg[name]

    def fit(
        self,
        network: nn.Module,
        data: ImageData,
        *,
        teacher: nn.Module | None = None,
        callbacks: Iterable[Callback] = (),
        resume: Path | None = None,
    ) -> None:
        """Train `network` in place, and leave it and its teacher on the CPU.

        Parameters
        ----------
        network
            What is trained.
        data
            What it is trained on.
        teacher
            The dense network to distil from, where distillation is on.
        callbacks
            Further callbacks of this stage.
        resume
            The checkpoint to go on from.
        """
        # Each stage starts from its own seed, so that a resumed or skipped first stage does not
        # change the second.
        pl.seed_everything(self.cfg.seed, workers=True, verbose=False)
        compile_steps = self.cfg.get("compile_steps", False)  # older runs that go on do not know it
        distil = teacher is not None and is_set(self.cfg.distillation)
        module = Classifier(
            network,
            build(self.options.optimizer),
            label_smoothing=self.options.label_smoothing,
            distillation=build(self.cfg.distillation) if distil else None,
            teacher=teacher if distil else None,
            channels_last=self.cfg.channels_last,
            compile_steps=compile_steps,
            seed=self.cfg.seed,
        )
        module.train()  # what was just evaluated is not in training mode
        trainer = self._trainer([*callbacks, *self._callbacks()])
        if compile_steps and is_first_process():
            say("the first step compiles the network, which may take some minutes")
        _log.info("stage %s%s", self.name, f" from {resume}" if resume else "")
        if resume is not None:
            check_whole(resume)
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        for left in (network, *([] if teacher is None else [teacher])):
            # As it would be when read from its checkpoint, where a resumed run takes it from.
            left.cpu().eval().to(memory_format=torch.contiguous_format)

    def _trainer(self, callbacks: list[Callback]) -> pl.Trainer:
        trainer: pl.Trainer = build(
            self.cfg.trainer,
            max_epochs=self.options.epochs,
            callbacks=callbacks,
            logger=self._loggers(),
            default_root_dir=str(self.folder.path),
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        return trainer

    def _callbacks(self) -> list[Callback]:
        made = []
        for name, node in self.cfg.callbacks.items():
            if not is_set(node):
                continue
            place = {}
            if node._target_.endswith(".ModelCheckpoint") and "dirpath" not in node:
                last = self.folder.last(self.name)
                place["dirpath"] = str(last.parent)
                if name == "last":  # what resume= goes on from; others have names of their own
                    place["filename"] = last.stem
            made.append(build(node, **place))
        for callback in made:
            if isinstance(callback, StageProgress):
                callback.title = TITLES[self.name]
        return made

    def _loggers(self) -> list[Logger]:
        version = self.folder.log_version(self.name)
        return [
            build(node, save_dir=str(self.folder.path), name="logs", version=version)
            for node in self.cfg.logger.values()
            if is_set(node)
        ]


def save_weights(network: nn.Module, path: Path, **extra: Any) -> None:
    """Write a network's state dict, and nothing of the training, under its plain names.

    Parameters
    ----------
    network
        On the CPU.
    path
        Written whole or not at all.
    **extra
        Plain values to store beside ``state_dict``.
    """
    with draft_of(path) as draft:
        torch.save({"state_dict": network.state_dict(), **extra}, draft)

"""A short fit on random images, each step timed, and within it the sparsity callback."""

from __future__ import annotations

import io
import logging
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from benchmarks.networks import random_images
from blocksparse.sparsity import Block, Cubic
from blocksparse.training import Classifier, build_model
from blocksparse.training.sparsity_callback import SparsityCallback


@dataclass
class Steps:
    """What the steps of a fit took, in seconds; the first one, which sets up memory, is left out.

    Attributes
    ----------
    whole : list of float
        From the start of a step to its end, imposing the masks included; steps in which they were
        built anew are left out, as there are far more of them than in a real training.
    masked : list of float
        What the sparsity callback took in steps in which it only imposed the masks.
    updated : list of float
        What it took in steps in which it built them anew, too.
    """

    whole: list[float] = field(default_factory=list)
    masked: list[float] = field(default_factory=list)
    updated: list[float] = field(default_factory=list)


class _Clock(Callback):
    """Notes when it is called; one before the sparsity callback and one after enclose it."""

    def __init__(self) -> None:
        self.started = self.stepped = self.ended = 0.0

    # Two of one class must differ, or Lightning takes the second for the first.
    @property
    def state_key(self) -> str:
        return f"clock {id(self)}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._step)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def _step(self, *args: Any, **kwargs: Any) -> None:
        self.stepped = time.perf_counter()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended = time.perf_counter()


class _Last(_Clock):
    """The clock after the sparsity callback: does the sums."""

    def __init__(self, first: _Clock, sparsity: SparsityCallback | None) -> None:
        super().__init__()
        self.first, self.sparsity = first, sparsity
        self.steps = Steps()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end()
        if trainer.global_step == 1:
            return
        first, steps = self.first, self.steps
        if self.sparsity is not None:
            # In the hook of the optimizer, and at the end of the step, where it logs.
            spent = self.stepped - first.stepped + self.ended - first.ended
            if self.sparsity.state_dict()["updated_at"] == trainer.global_step:
                steps.updated.append(spent)
                return
            steps.masked.append(spent)
        steps.whole.append(self.ended - first.started)


def fit(
    model: str, image: int, batch: int, steps: int, sparsity: float, interval: int, folder: str
) -> Steps:
    """Train a network for some steps and time them.

    Parameters
    ----------
    model : str
        One of `model_names()`; 1000 classes, random weights.
    image, batch : int
        Height and width of the random images in pixels, and how many make a step.
    steps : int
        Of the fit, at least 2.
    sparsity : float
        Where the ramp ends, at the end of the fit; 0 trains without the callback.
    interval : int
        Steps between two updates of the masks.
    folder : str
        For the callback's plan.
    """
    torch.manual_seed(0)
    network = build_model(model, num_classes=1000, input_shape=(3, image, image))
    images, labels = random_images(batch, image, 0), torch.randint(1000, (batch,))
    callback = None
    if sparsity:
        schedule = Cubic(0.0, 1.0)
        callback = SparsityCallback(sparsity, Block(8, 8), schedule=schedule, interval=interval)
    first = _Clock()
    last = _Last(first, callback)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[first, *([callback] if callback else []), last],
    )
    loader: DataLoader[Any] = DataLoader([(images, labels)] * steps, batch_size=None)  # type: ignore[arg-type]
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers for a loader that loads nothing
        trainer.fit(Classifier(network), loader)
    return last.steps

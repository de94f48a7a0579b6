"""A training resumed from any checkpoint ends in the weights of the uninterrupted one."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from trainers import quiet_trainer

from blocksparse.training import (
    BatchNormReestimation,
    Classifier,
    Digits,
    Distillation,
    Optimization,
    ResNetCifar,
)

EPOCHS = 3
BATCHES = 5


class SaveEverywhere(pl.Callback):
    """Write a checkpoint from many places of the second epoch, and at the ends of epochs."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, trainer, name):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 2:
            self.save(trainer, "batch_start")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1:
            self.save(trainer, f"batch_end_{batch_idx}")

    def on_validation_end(self, trainer, module):
        self.save(trainer, f"validation_end_{trainer.global_step}")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, f"epoch_end_{trainer.current_epoch}")


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = ResNetCifar(1, num_classes=10, in_channels=1, widths=(4, 8, 8))
    model.linear = nn.Sequential(nn.Dropout(0.3), model.linear)
    return model


TEACHER = network(1)


def fit(ckpt_path: Path | None = None, save_to: Path | None = None, workers: int = 0, **options):
    torch.manual_seed(1234 if ckpt_path else 99)  # the global generator must not matter
    module = Classifier(
        network(7 if ckpt_path else 0),
        Optimization(lr=0.05, warmup=0.2, hold=0.5, weight_decay_until=0.5),
        label_smoothing=0.1,
        distillation=Distillation(),
        teacher=copy.deepcopy(TEACHER),
    )
    if not ckpt_path:
        module.model.load_state_dict(network(0).state_dict())
    callbacks: list[pl.Callback] = [BatchNormReestimation(num_batches=3)]
    trainer = quiet_trainer(
        **{"max_epochs": EPOCHS, **options},
        limit_train_batches=BATCHES,
        limit_val_batches=1,
        callbacks=callbacks + ([SaveEverywhere(save_to)] if save_to else []),
    )
    data = Digits(batch_size=16, val_batch_size=64, num_workers=workers, seed=3)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


def check_all(folder: Path, least: int, workers: int = 0, **options) -> None:
    expected = fit(save_to=folder, workers=workers, **options).state_dict()
    checkpoints = sorted(folder.glob("*.ckpt"))
    assert len(checkpoints) >= least
    differing = {}
    for checkpoint in checkpoints:
        resumed = fit(checkpoint, workers=workers, **options).state_dict()
        assert resumed.keys() == expected.keys()
        if names := [n for n, value in expected.items() if not torch.equal(resumed[n], value)]:
            differing[checkpoint.name] = names
    assert not differing


@pytest.mark.slow
def test_from_every_kind_of_checkpoint(tmp_path):
    check_all(tmp_path, least=12)


@pytest.mark.slow
def test_with_validation_inside_the_epoch(tmp_path):
    check_all(tmp_path, least=12, val_check_interval=2)


@pytest.mark.slow
def test_with_half_accumulated_gradients(tmp_path):
    check_all(tmp_path, least=12, accumulate_grad_batches=2)


@pytest.mark.slow
def test_with_a_number_of_steps_instead_of_epochs(tmp_path):
    check_all(tmp_path, least=9, max_epochs=-1, max_steps=13)


@pytest.mark.long
def test_with_worker_processes(tmp_path):
    check_all(tmp_path, least=12, workers=2)

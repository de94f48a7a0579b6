"""A small network to prune in real fits, and how the tests run and read them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from blocksparse.sparsity import Block, Cubic, checkpoint_masks
from blocksparse.training.sparsity_callback import SparsityCallback

STEPS = 12  # two epochs of six batches


class Tiny(LightningModule):
    """A small network on data that depend on the step alone, so that any step can be repeated."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 20, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20 * 16, 24),
            nn.ReLU(),
            nn.Linear(24, 4),
        )
        self.optimizer = optimizer
        self.lr = 0.05

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(1000 * self.global_step + batch_idx)
        images = torch.randn(8, 3, 8, 8, generator=generator)
        labels = torch.randint(4, (8,), generator=generator)
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.model(torch.ones(1, 3, 8, 8)).sum())

    test_step = validation_step

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-3)
        return torch.optim.AdamW(self.parameters(), self.lr / 10)


class Rank(Tiny):
    """The same in one of several processes, each with images of its own."""

    def training_step(self, batch, batch_idx):
        torch.manual_seed(self.global_rank)
        images = torch.randn(8, 3, 8, 8) + self.global_step
        return F.cross_entropy(self.model(images), torch.arange(8) % 4)


def refuse(*args):
    """Stand in for what only one process may do."""
    raise AssertionError("the masks of this rank must not count")


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(6)), batch_size=1)


def sparsity(**changes) -> SparsityCallback:
    settings = {
        "target": 0.5,
        "pattern": Block(4, 4),
        "schedule": Cubic(0.1, 0.7),
        "interval": 2,
        **changes,
    }
    return SparsityCallback(**settings)


def trainer(folder, *callbacks, **changes) -> Trainer:
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": folder,
        "callbacks": list(callbacks),
        "deterministic": True,
        **changes,
    }
    return Trainer(**settings)


def every_step(folder) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )


def read(path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def check_zeros(checkpoint: dict) -> float:
    """All masked entries are exactly zero; return the sparsity counted in the weights."""
    masks = checkpoint_masks(checkpoint)
    zeros = 0
    for param, mask in masks.items():
        weight = checkpoint["state_dict"][f"model.{param}"]
        assert weight.shape == mask.shape
        assert (weight[~mask] == 0).all()
        zeros += int((weight == 0).sum())
    return zeros / sum(mask.numel() for mask in masks.values())

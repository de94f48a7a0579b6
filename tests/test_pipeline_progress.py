"""The progress bar of a stage, on a terminal and in a file."""

from __future__ import annotations

import io
import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from blocksparse.pipeline.progress import StageProgress


class Line(LightningModule):
    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.fail_at = fail_at

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if self.global_step == self.fail_at:
            raise RuntimeError("broken")
        loss = self.layer(batch).square().mean()
        self.log("train/loss", 0.25, prog_bar=True)
        self.log("sparsity", 0.431, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(console: Console, epochs: int = 10, fail_at: int | None = None) -> StageProgress:
    bar = StageProgress(console)
    bar.title = "pruning"
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[bar],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Line(fail_at), DataLoader(torch.ones(4, 1)))  # type: ignore[arg-type]
    return bar


def test_file_gets_a_few_lines() -> None:
    text = io.StringIO()
    fit(Console(file=text, width=100))
    lines = text.getvalue().splitlines()
    assert lines[0] == "pruning: starts at epoch 1/10"
    assert re.fullmatch(r"pruning: epoch 1/10  loss 0.250  sparsity 43.1 %  \d+ s", lines[1])
    assert lines[-1].startswith("pruning: epoch 10/10")
    assert 5 <= len(lines) <= 8


def test_terminal_gets_one_bar_that_ends_full() -> None:
    text = io.StringIO()
    fit(Console(file=text, width=80, force_terminal=True, color_system=None))
    shown = text.getvalue().split("\r")[-1]
    last = [line for line in text.getvalue().splitlines() if "epoch" in line][-1]
    assert "epoch 10/10" in last
    assert "sparsity 43.1 %" in last
    assert "╺" not in last.rpartition("\r")[2]
    assert "\x1b[?25h" in shown  # the cursor is back


def test_error_frees_the_terminal() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with pytest.raises(RuntimeError, match="broken"):
        fit(console, fail_at=2)
    fit(console)  # rich refuses a second live display
    assert "epoch 10/10" in console.file.getvalue()  # type: ignore[attr-defined]


def test_disabled_draws_nothing() -> None:
    text = io.StringIO()
    bar = StageProgress(Console(file=text, force_terminal=True))
    bar.disable()
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[bar], logger=False, enable_checkpointing=False
    )
    bar.disable()
    trainer.fit(Line(), DataLoader(torch.ones(2, 1)))  # type: ignore[arg-type]
    assert not text.getvalue()

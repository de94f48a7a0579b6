"""Training steps through `torch.compile`: the same training, and plain words where it cannot be."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache
from trainers import quiet_trainer

from blocksparse.sparsity import Block
from blocksparse.training import Classifier, Digits, Distillation, SparsityCallback


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


class Small(nn.Module):
    """Two convolutions, one with batch norm: compiled in seconds."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 10)

    def forward(self, images):
        features = torch.relu(self.conv1(images))
        features = torch.relu(self.norm(self.conv2(features)))
        return self.linear(features.mean((2, 3)))


def fit(
    folder: Path, compile_steps: bool = True, resume: Path | None = None, save: Path | None = None
) -> Classifier:
    module = Classifier(
        Small(),
        distillation=Distillation(),
        teacher=Small(1),
        channels_last=True,
        compile_steps=compile_steps,
    )

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if save and trainer.global_step == 5:
                trainer.save_checkpoint(save)

    trainer = quiet_trainer(
        default_root_dir=folder,
        max_epochs=2,
        limit_train_batches=4,
        limit_val_batches=1,
        callbacks=[SparsityCallback(0.5, Block(8, 8), interval=1, root="model"), Save()],
    )
    trainer.fit(module, datamodule=Digits(batch_size=16, val_batch_size=24), ckpt_path=resume)
    return module


@pytest.mark.long
def test_a_compiled_training_is_the_same_and_resumes(tmp_path):
    plain, whole = fit(tmp_path, False), fit(tmp_path, save=tmp_path / "middle.ckpt")
    again = fit(tmp_path, resume=tmp_path / "middle.ckpt")
    assert plain.state_dict().keys() == whole.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], value, rtol=1e-3, atol=1e-4)
        assert torch.equal(again.state_dict()[name], whole.state_dict()[name]), name
    weight = whole.model.conv2.weight
    assert (weight == 0).float().mean() == 0.5
    # The network is what it was: it runs, and is copied, as if nothing had been compiled.
    images = torch.randn(3, 1, 8, 8)
    copied = copy.deepcopy(whole).eval()
    torch.testing.assert_close(copied(images), whole.eval()(images), rtol=0, atol=0)


@pytest.mark.long
def test_steps_run_compiled_and_validation_does_not(monkeypatch, tmp_path):
    plain = []
    forward = Small.forward

    def noted(self, images):
        if not torch.compiler.is_compiling():
            plain.append((len(images), self.training))
        return forward(self, images)

    monkeypatch.setattr(Small, "forward", noted)
    fit(tmp_path)
    assert plain == [(24, False)] * 3  # Lightning's check of validation, and two epochs


@pytest.mark.slow
def test_no_compiler(tmp_path):
    refused = pytest.raises(ValueError, match=r"compile_steps=true, but.*C\+\+ compiler")
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), fresh_cache(), refused:
        fit(tmp_path)


def test_feature_maps_are_refused():
    with pytest.raises(ValueError, match=r"compile_steps=false, or distillation\.features=0"):
        Classifier(
            Small(), distillation=Distillation(features=1.0), teacher=Small(1), compile_steps=True
        )

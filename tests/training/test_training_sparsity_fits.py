"""The sparsity callback across fits: copies, second fits, failures, tuning, and processes."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from sparsity_fits import Tiny, every_step, loader, read, same, sparsity, trainer

from blocksparse.sparsity import checkpoint_masks
from blocksparse.training.sparsity_callback import SparsityCallback


class Copier(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        twin = copy.deepcopy(pl_module)
        assert same(twin.state_dict(), pl_module.state_dict())
        images = torch.randn(2, 3, 8, 8)
        assert torch.equal(twin.model(images), pl_module.model(images))
        twin.model[2].weight.grad = torch.ones_like(twin.model[2].weight)
        torch.optim.SGD(twin.parameters(), 1.0).step()  # it is a plain network of its own
        assert (twin.model[2].weight != pl_module.model[2].weight).all()
        copy.deepcopy(trainer.callbacks)
        self.copied = True


def test_deep_copies_in_mid_training(tmp_path):
    copier = Copier()
    trainer(tmp_path, copier, sparsity()).fit(Tiny(), loader())
    assert copier.copied


def test_a_second_fit_keeps_the_masks(tmp_path):
    module, callback = Tiny(), sparsity()
    first = trainer(tmp_path, callback)
    first.fit(module, loader())
    masks, before = callback.masks, copy.deepcopy(module.state_dict())
    first.fit_loop.max_epochs = 4
    first.fit(module, loader())
    assert first.global_step == 24
    assert same(callback.masks, masks)
    assert not same(module.state_dict(), before)
    trainer(tmp_path, callback).fit(module, loader())
    assert same(callback.masks, masks)
    for param, mask in masks.items():
        assert (module.model.get_parameter(param)[~mask] == 0).all()


class Fail(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 10:
            raise RuntimeError("the power went out")

    def on_exception(self, trainer, pl_module, exception):
        raise exception  # so that the callbacks after this one never hear of it


def test_a_fit_after_a_failed_one_masks_the_network_it_is_given(tmp_path):
    module, callback = Tiny(), sparsity()
    with pytest.raises(RuntimeError, match="power"):
        trainer(tmp_path, Fail(), callback).fit(module, loader())
    other = copy.deepcopy(module)
    trainer(tmp_path, callback).fit(other, loader())
    for param, mask in callback.masks.items():
        assert (other.model.get_parameter(param)[~mask] == 0).all()


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        trainer.should_stop = trainer.global_step >= 4


def test_a_ramp_cut_short_says_so_and_goes_on_later(tmp_path, caplog):
    module, callback = Tiny(), sparsity(interval=1)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, callback, Stop()).fit(module, loader())
    assert "before the sparsity ramp ended" in caplog.text
    assert not callback.finished
    half = callback.masks
    assert sum(int((~mask).sum()) for mask in half.values()) > 0
    trainer(tmp_path, callback).fit(module, loader())
    assert callback.finished
    assert all(not (callback.masks[param] & ~half[param]).any() for param in half)


def test_testing_after_a_fit(tmp_path):
    module, callback = Tiny(), sparsity()
    fit = trainer(tmp_path, callback, every_step(tmp_path))
    fit.fit(module, loader(), loader())
    after = copy.deepcopy(module.state_dict())
    fit.test(module, loader(), verbose=False)
    fit.validate(module, loader(), verbose=False)
    assert same(module.state_dict(), after)
    fit.test(module, loader(), ckpt_path=tmp_path / "step=5.ckpt", verbose=False)
    assert same(callback.masks, checkpoint_masks(read(tmp_path / "step=5.ckpt")))


def test_the_learning_rate_finder_leaves_no_trace(tmp_path):
    alone = Tiny()
    trainer(tmp_path, sparsity()).fit(alone, loader())
    module, callback = Tiny(), sparsity()
    fit = trainer(tmp_path, callback)
    lr = module.lr
    Tuner(fit).lr_find(module, loader(), num_training=5, update_attr=False)
    assert module.lr == lr
    assert not callback.masks
    fit.fit(module, loader())
    assert callback.finished
    assert same(module.state_dict(), alone.state_dict())
    masks = callback.masks
    Tuner(fit).lr_find(module, loader(), num_training=5, update_attr=False)
    assert same(callback.masks, masks)
    assert same(module.state_dict(), alone.state_dict())


class InMidFit(LearningRateFinder):
    """Looks for a learning rate at the start of the second epoch, as Lightning's manual shows."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        callback = next(c for c in trainer.callbacks if isinstance(c, SparsityCallback))
        if trainer.current_epoch == 1 and not hasattr(self, "before"):
            self.before = copy.deepcopy((pl_module.state_dict(), callback.state_dict()))
            self.lr_find(trainer, pl_module)
            weights, state = self.before
            assert same(pl_module.state_dict(), weights)
            assert same(callback.state_dict()["masks"], state["masks"])
            assert callback.state_dict()["share"] == state["share"]
            assert callback.state_dict()["updated_at"] == state["updated_at"]


def test_the_learning_rate_finder_in_mid_training(tmp_path):
    finder = InMidFit(num_training_steps=4, update_attr=False)
    module, callback = Tiny(), sparsity(interval=1)
    trainer(tmp_path, callback, finder).fit(module, loader())
    assert finder.before[1]["share"] < 1.0
    assert callback.finished
    for param, mask in callback.masks.items():
        assert (module.model.get_parameter(param)[~mask] == 0).all()


DDP = """
import hashlib, pathlib, sys, torch
from lightning.pytorch import Callback
from blocksparse.sparsity import MaskedWeights
from sparsity_fits import Rank, loader, refuse, sparsity, trainer

class Compare(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        digest = hashlib.sha256()
        for param, mask in trainer.callbacks[0].masks.items():
            digest.update(mask.numpy().tobytes())
            assert (pl_module.model.get_parameter(param)[~mask] == 0).all()
        number = torch.tensor(int.from_bytes(digest.digest()[:6], "big"))
        assert len(set(pl_module.all_gather(number).tolist())) == 1, "masks differ"

callback = sparsity()
fit = trainer(sys.argv[1], callback, Compare(), devices=2, strategy="ddp")
if fit.global_rank == 1:
    MaskedWeights.build = refuse
fit.fit(Rank(), loader())
assert callback.finished
if sys.argv[2] == "diverge":
    module = Rank()
    module.lr = 1e30
    try:
        trainer(sys.argv[1], sparsity(), devices=2, strategy="ddp").fit(module, loader())
    except ValueError as error:
        assert "diverged" in str(error)
        callback = None
pathlib.Path(sys.argv[1], f"rank{fit.global_rank}").write_text("done" if callback else "refused")
"""


@pytest.mark.long
@pytest.mark.parametrize("case", ["converge", "diverge"])
def test_two_processes_have_the_same_masks(tmp_path, case):
    script = tmp_path / "two.py"
    script.write_text(DDP)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), case],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        said = (tmp_path / f"rank{rank}").read_text()
        assert said == ("refused" if case == "diverge" else "done")

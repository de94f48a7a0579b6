"""Dropped weights that go on learning, in real fits: zeros, resuming, processes, odd steps."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.tuner import Tuner
from sparsity_fits import (
    STEPS,
    Tiny,
    check_zeros,
    every_step,
    loader,
    read,
    same,
    sparsity,
    trainer,
)

from blocksparse.sparsity import NM, Block, Cubic, OneShot, checkpoint_masks
from blocksparse.training.step_hooks import StepHooks


def learning(**changes):
    return sparsity(**{"backward": "straight_through", "update_until": 0.9, **changes})


class Masked(Callback):
    """Every forward pass of the training sees exact zeros."""

    def on_train_start(self, trainer, pl_module):
        self.seen = 0
        callback = next(c for c in trainer.callbacks if hasattr(c, "masks"))

        def look(module, args):
            for param, mask in callback.masks.items():
                assert (pl_module.model.get_parameter(param)[~mask] == 0).all()
            self.seen += 1

        self.handle = pl_module.model.register_forward_pre_hook(look)

    def on_train_end(self, trainer, pl_module):
        self.handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "interval", "score"),
    [(NM(2, 4), 1, "l2"), (Block(4, 4), 2, "taylor"), (Block(4, 4, shared=False), 3, "movement")],
)
def test_checkpoints_hold_zeros_and_resuming_is_exact(tmp_path, pattern, interval, score):
    settings = {"pattern": pattern, "interval": interval, "score": score}
    module, callback, masked = Tiny(), learning(**settings), Masked()
    keys = list(module.state_dict())
    trainer(tmp_path, callback, masked, every_step(tmp_path)).fit(module, loader())
    assert masked.seen == STEPS
    kept = [read(tmp_path / f"step={step}.ckpt") for step in range(1, STEPS + 1)]
    assert all(list(checkpoint["state_dict"]) == keys for checkpoint in kept)
    seen = [check_zeros(checkpoint) for checkpoint in kept]
    assert seen[0] < seen[3] < seen[-1]
    assert seen[-1] >= 0.5
    assert callback.finished
    # Masks change after the ramp (0.7 of 12 steps), and no more from step 11 (0.9) on.
    states = [checkpoint["callbacks"]["SparsityCallback"] for checkpoint in kept]
    assert [state["held"] is None for state in states] == [False] * 10 + [True] * 2
    assert same(states[10]["masks"], states[11]["masks"])
    masks = [checkpoint_masks(checkpoint) for checkpoint in kept]
    back = [
        int((later[param] & ~earlier[param]).sum())
        for earlier, later in itertools.pairwise(masks)
        for param in earlier
    ]
    assert sum(back) > 0
    for step in (2, 6, 10):
        other, again = Tiny(), learning(**settings)
        with torch.no_grad():
            other.model[2].weight.mul_(3.0)  # whatever it was before, the checkpoint counts
        trainer(tmp_path, again).fit(other, loader(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert same(other.state_dict(), kept[-1]["state_dict"]), f"resumed at step {step}"
        assert same(again.masks, masks[-1])


def test_every_group_obeys_at_the_end_of_sr_ste(tmp_path):
    module = Tiny("adamw")
    callback = learning(
        pattern=NM(2, 4), interval=1, schedule=OneShot(), update_until=1.0, include=["2"]
    )
    trainer(tmp_path, callback).fit(module, loader())
    groups = module.model[2].weight.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    assert ((groups != 0).sum(1) == 2).all()
    assert callback.state_dict()["held"] is None


def test_accumulation_and_bf16(tmp_path):
    module, callback, masked = Tiny(), learning(interval=1), Masked()
    fit = trainer(
        tmp_path,
        callback,
        masked,
        every_step(tmp_path),
        accumulate_grad_batches=2,
        precision="bf16-mixed",
        gradient_clip_val=0.5,
    )
    fit.fit(module, loader())
    assert (fit.global_step, masked.seen) == (6, 12)
    assert check_zeros(read(tmp_path / "step=6.ckpt")) >= 0.5


class Skip(Callback):
    """What the scaler of float16 does with gradients that overflow: no step."""

    def on_train_start(self, trainer, pl_module):
        optimizer, self.steps = trainer.optimizers[0], 0
        real = trainer.precision_plugin

        def scaled(optimizer, model, closure, **kwargs):
            closure()
            real._after_closure(model, optimizer)
            self.steps += 1
            if self.steps % 3:
                torch.optim.SGD.step(optimizer)

        assert isinstance(optimizer, torch.optim.SGD)
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(real, "optimizer_step", scaled)

    def on_train_end(self, trainer, pl_module):
        self.patch.undo()


def test_a_skipped_step_leaves_the_zeros(tmp_path):
    module, callback, masked, skip = Tiny(), learning(interval=1), Masked(), Skip()
    trainer(tmp_path, masked, callback, skip, every_step(tmp_path)).fit(module, loader())
    assert skip.steps == STEPS
    assert masked.seen == STEPS
    assert callback.finished


def test_hooks_enclose_the_change_with_a_closure_and_without():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, seen = torch.optim.SGD([weight], 1.0), []
    hooks = StepHooks(
        [optimizer],
        lambda _: seen.append(("before", float(weight))),
        lambda _: seen.append(("after", float(weight))),
    )
    around = [("before", 1.0), ("after", 0.0)]

    def closure():
        weight.grad = torch.ones(1)
        seen.append(("gradient", float(weight)))
        hooks.gradients_ready(optimizer)

    optimizer.step(closure)
    assert seen == [("gradient", 1.0), *around]
    weight.data.fill_(1.0)
    seen.clear()
    hooks.gradients_ready(optimizer)  # the scaler ran the closure before; the step may not come
    assert seen == []
    optimizer.step()
    assert seen == around
    hooks.remove()
    optimizer.step()
    assert seen == around


class Halves(Tiny):
    """Steps one optimizer or two itself, on data that depend on neither."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.count = count

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(10 * self.current_epoch + batch_idx)
        images = torch.randn(8, 3, 8, 8, generator=generator)
        loss = torch.nn.functional.cross_entropy(self.model(images), torch.arange(8) % 4)
        optimizers = [self.optimizers()] if self.count == 1 else self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        params = list(self.parameters())
        halves = [params] if self.count == 1 else [params[:4], params[4:]]
        return [torch.optim.SGD(half, 0.05, momentum=0.9) for half in halves]


@pytest.mark.parametrize("score", ["l2", "taylor"])
def test_two_optimizers_move_what_one_would(tmp_path, score):
    settings = {"schedule": OneShot(0.2), "update_until": 1.0, "decay": 0.5, "score": score}
    found = []
    for count in (1, 2):
        module, callback = Halves(count), learning(interval=2 * count, **settings)
        fit = trainer(tmp_path, callback, max_epochs=None, max_steps=10 * count)
        fit.fit(module, loader())  # Lightning counts the steps of all optimizers
        found.append((module.state_dict(), callback.masks))
    assert same(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])


def test_copies_second_fits_and_the_learning_rate_finder(tmp_path):
    alone = Tiny()
    trainer(tmp_path, learning()).fit(alone, loader())
    module, callback = Tiny(), learning()
    fit = trainer(tmp_path, callback)
    Tuner(fit).lr_find(module, loader(), num_training=5, update_attr=False)
    fit.fit(module, loader())
    assert same(module.state_dict(), alone.state_dict())
    masks = callback.masks
    trainer(tmp_path, callback).fit(copy.deepcopy(module), loader())
    assert same(callback.masks, masks)


class Break(Callback):
    """Fails in the middle of a step, when the dropped values are back in place."""

    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step == 8:
            trainer.optimizers[0].param_groups[0]["lr"] = "broken"


def test_a_step_that_breaks_off_leaves_zeros(tmp_path):
    module, callback = Tiny(), learning()
    with pytest.raises(TypeError):
        trainer(tmp_path, callback, Break()).fit(module, loader())
    dropped = [(param, ~mask) for param, mask in callback.masks.items()]
    assert sum(int(gone.sum()) for _, gone in dropped) > 0
    for param, gone in dropped:
        assert (module.model.get_parameter(param)[gone] == 0).all()
        assert (callback.state_dict()["held"][param] != 0).any()


def test_settings_that_differ_or_cannot_be_are_refused(tmp_path):
    trainer(tmp_path, sparsity(), every_step(tmp_path)).fit(Tiny(), loader())
    path = tmp_path / "step=3.ckpt"
    with pytest.raises(ValueError, match="backward: masked in the checkpoint, straight_through"):
        trainer(tmp_path, learning()).fit(Tiny(), loader(), ckpt_path=path)
    old = read(path)
    del old["callbacks"]["SparsityCallback"]["settings"]["backward"]  # as before it was there
    torch.save(old, path)
    trainer(tmp_path, sparsity()).fit(Tiny(), loader(), ckpt_path=path)
    with pytest.raises(ValueError, match="score=taylor needs gradients"):
        sparsity(score="taylor", schedule=OneShot())
    sparsity(score="taylor", schedule=OneShot(0.1))
    sparsity(score="taylor", schedule=Cubic())
    for schedule in (OneShot(), OneShot(0.3), Cubic(0.3, 0.3)):
        with pytest.raises(ValueError, match=r"never learn. Set sparsity.update_until=1.0"):
            learning(schedule=schedule, update_until=None)
    learning(schedule=OneShot(0.3), update_until=1.0)
    learning(schedule=Cubic(), update_until=None)


DDP = """
import hashlib, pathlib, sys, torch
from lightning.pytorch import Callback
from blocksparse.sparsity import Ramp
from sparsity_fits import Rank, loader, refuse, sparsity, trainer

class Compare(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        callback, digest = trainer.callbacks[0], hashlib.sha256()
        held = callback.state_dict()["held"] or {}
        for param, mask in callback.masks.items():
            digest.update(mask.numpy().tobytes())
            digest.update(pl_module.model.get_parameter(param).detach().numpy().tobytes())
            if param in held:
                digest.update(held[param].numpy().tobytes())
                self.held = True
            assert (pl_module.model.get_parameter(param)[~mask] == 0).all()
        number = torch.tensor(int.from_bytes(digest.digest()[:6], "big"))
        assert len(set(pl_module.all_gather(number).tolist())) == 1, "ranks differ"

callback = sparsity(
    backward="straight_through", update_until=0.9, score=sys.argv[2], interval=int(sys.argv[3])
)
compare = Compare()
fit = trainer(sys.argv[1], callback, compare, devices=2, strategy="ddp")
if fit.global_rank == 1:
    Ramp.build = refuse
fit.fit(Rank(), loader())
assert callback.finished and compare.held
pathlib.Path(sys.argv[1], f"rank{fit.global_rank}").write_text("done")
"""


@pytest.mark.long
@pytest.mark.parametrize(("score", "interval"), [("l2", "1"), ("taylor", "2")])
def test_two_processes_stay_alike(tmp_path, score, interval):
    script = tmp_path / "two.py"
    script.write_text(DDP)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), score, interval],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["done", "done"]

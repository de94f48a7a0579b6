"""The sparsity callback in a fit: checkpoints, resuming, logs, plans, configs, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging
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

from blocksparse.sparsity import (
    NM,
    Block,
    Global,
    Linear,
    OneShot,
    Unstructured,
    checkpoint_masks,
    checkpoint_patterns,
    checkpoint_plan,
)
from blocksparse.training.sparsity_callback import SparsityCallback

CONFIGS = Path(__file__).parents[2] / "configs"


class Saver(Callback):
    """Writes a checkpoint at the first moment after a step that a callback hears of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, *args):
        trainer.save_checkpoint(self.folder / f"early-{trainer.global_step}.ckpt")
        callback = next(c for c in trainer.callbacks if isinstance(c, SparsityCallback))
        for param, mask in callback.masks.items():  # in training too, not only in what is saved
            assert (pl_module.model.get_parameter(param)[~mask] == 0).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("pattern", "allocation"),
    [(Block(4, 4), None), (Block(4, 4, shared=False), Global()), (NM(2, 4), None)],
)
def test_every_checkpoint_holds_exact_zeros(tmp_path, optimizer, pattern, allocation):
    module = Tiny(optimizer)
    keys = list(module.state_dict())
    callback = sparsity(pattern=pattern, allocation=allocation)
    saver = Saver(tmp_path)
    trainer(tmp_path, saver, callback, every_step(tmp_path)).fit(module, loader())
    seen = []
    for step in range(1, STEPS + 1):
        early, regular = read(tmp_path / f"early-{step}.ckpt"), read(tmp_path / f"step={step}.ckpt")
        assert list(regular["state_dict"]) == keys
        assert same(early["state_dict"], regular["state_dict"])
        state = regular["callbacks"]["SparsityCallback"]
        assert all(bits.dtype == torch.uint8 for bits in state["masks"].values())
        assert same(state["masks"], early["callbacks"]["SparsityCallback"]["masks"])
        seen.append(check_zeros(regular))
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] >= 0.5
    assert seen[8] == seen[-1]  # the ramp ends at 0.7 of 12 steps
    assert len(set(seen)) > 3
    assert callback.finished
    assert checkpoint_patterns(regular) == dict.fromkeys(("2.weight", "5.weight"), pattern)
    assert checkpoint_plan(regular) == callback.plan
    # Momentum goes on pulling at dropped weights, so this was not for free.
    buffers = regular["optimizer_states"][0]["state"][2]
    buffer = buffers.get("momentum_buffer", buffers.get("exp_avg"))
    assert (buffer[module.model[2].weight == 0] != 0).any()


def test_masks_are_fixed_once_the_ramp_has_ended(tmp_path):
    callback = sparsity(interval=1)
    trainer(tmp_path, callback, every_step(tmp_path)).fit(Tiny(), loader())
    ended = read(tmp_path / "step=9.ckpt")["callbacks"]["SparsityCallback"]
    assert ended["share"] == 1.0
    assert read(tmp_path / "step=8.ckpt")["callbacks"]["SparsityCallback"]["share"] < 1.0
    final = read(tmp_path / "step=12.ckpt")["callbacks"]["SparsityCallback"]
    assert same(ended["masks"], final["masks"])
    assert ended["updated_at"] == final["updated_at"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_from_any_step_ends_in_the_same_weights(tmp_path, optimizer):
    settings = {"pattern": Block(4, 4, shared=False), "interval": 3}
    module = Tiny(optimizer)
    trainer(tmp_path, sparsity(**settings), every_step(tmp_path)).fit(module, loader())
    wanted = read(tmp_path / f"step={STEPS}.ckpt")
    for step in range(1, STEPS):
        other = Tiny(optimizer)
        with torch.no_grad():
            other.model[2].weight.mul_(3.0)  # whatever it was before, the checkpoint counts
        callback = sparsity(**settings)
        again = trainer(tmp_path, callback)
        again.fit(other, loader(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert again.global_step == STEPS
        assert same(other.state_dict(), wanted["state_dict"]), f"resumed at step {step}"
        assert same(callback.masks, checkpoint_masks(wanted))


def test_gradient_accumulation_and_mixed_precision(tmp_path):
    module, callback = Tiny(), sparsity(interval=1)
    fit = trainer(
        tmp_path, callback, every_step(tmp_path), accumulate_grad_batches=2, precision="bf16-mixed"
    )
    fit.fit(module, loader())
    assert fit.global_step == 6
    sparsities = [check_zeros(read(tmp_path / f"step={step}.ckpt")) for step in range(1, 7)]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] >= 0.5
    assert callback.finished


class TwoOptimizers(Tiny):
    """Steps its optimizers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        params = list(self.parameters())
        return [torch.optim.SGD(half, 0.05, momentum=0.9) for half in (params[:4], params[4:])]


def test_manual_optimization(tmp_path):
    callback = sparsity()
    fit = trainer(tmp_path, callback, every_step(tmp_path), max_epochs=None, max_steps=24)
    fit.fit(TwoOptimizers(), loader())
    paths = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(paths) == 12
    assert max(check_zeros(read(path)) for path in paths) >= 0.5
    assert callback.finished


def test_averaged_weights_are_saved_with_exact_zeros(tmp_path):
    average = WeightAveraging(avg_fn=lambda old, new, count: 0.9 * old + 0.1 * new)
    trainer(tmp_path, average, sparsity(), every_step(tmp_path)).fit(Tiny(), loader())
    checkpoint = read(tmp_path / "step=10.ckpt")
    assert "current_model_state" in checkpoint
    assert check_zeros(checkpoint) >= 0.5


def test_the_plan_is_printed_and_saved(tmp_path, capsys):
    callback = sparsity(save_dir=str(tmp_path / "plan"))
    trainer(tmp_path, callback).fit(Tiny(), loader())
    printed = capsys.readouterr().out
    assert "first convolution" in printed
    assert "20x16x3x3" in printed
    saved = json.loads((tmp_path / "plan" / "sparsity_plan.json").read_text())
    assert [layer["name"] for layer in saved["layers"] if layer["pruned"]] == ["2", "5"]
    assert (tmp_path / "plan" / "sparsity_plan.md").is_file()
    assert callback.patterns() == {"2.weight": Block(4, 4), "5.weight": Block(4, 4)}


def test_what_is_logged_is_counted_in_the_weights(tmp_path):
    module = Tiny()
    with torch.no_grad():
        module.model[5].weight[3, 7:17] = 0.0  # frozen below, so that these zeros stay
    module.model[5].weight.requires_grad_(False)
    fit = trainer(tmp_path, sparsity(include=["2", "5"], dense=["5"]))
    fit.fit(module, loader())
    conv = module.model[2].weight
    metrics = fit.callback_metrics
    zeros = int((conv == 0).sum())
    assert metrics["sparsity"].item() == pytest.approx(zeros / conv.numel())
    everything = sum(param.numel() for param in module.parameters())
    assert metrics["sparsity_of_all"].item() == pytest.approx(zeros / everything)
    assert metrics["density/2"].item() == pytest.approx(1 - zeros / conv.numel())
    assert "density/5" not in metrics
    assert "sparsity" in fit.progress_bar_metrics


def test_one_shot_prunes_before_the_first_step(tmp_path):
    trainer(tmp_path, sparsity(schedule=OneShot()), every_step(tmp_path)).fit(Tiny(), loader())
    assert check_zeros(read(tmp_path / "step=1.ckpt")) >= 0.5


def test_initial_sparsity_from_the_model_is_kept_from_the_first_step(tmp_path):
    module = Tiny()
    with torch.no_grad():
        module.model[5].weight[:8, :80] = 0.0
    callback = sparsity(initial="from_model", schedule=Linear(0.5, 0.8))
    trainer(tmp_path, callback, every_step(tmp_path)).fit(module, loader())
    early = read(tmp_path / "step=2.ckpt")["state_dict"]["model.5.weight"]
    assert (early[:8, :80] == 0).all()
    assert int((early == 0).sum()) == 8 * 80
    assert callback.finished


def test_target_zero_trains_a_dense_network(tmp_path):
    dense, module, callback = Tiny(), Tiny(), sparsity(target=0.0)
    trainer(tmp_path).fit(dense, loader())
    fit = trainer(tmp_path, callback)
    fit.fit(module, loader())
    assert same(module.state_dict(), dense.state_dict())
    assert fit.callback_metrics["sparsity"] == 0.0
    assert callback.finished


def test_a_fast_run_of_one_step_prunes(tmp_path):
    callback = sparsity()
    trainer(tmp_path, callback, fast_dev_run=True).fit(Tiny(), loader())
    assert callback.finished


def test_errors_come_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="length is not known"):
        trainer(tmp_path, sparsity(), max_epochs=-1).fit(Tiny(), loader())
    with pytest.raises(ValueError, match="has no module 'backbone' to prune; it has: model"):
        trainer(tmp_path, sparsity(root="backbone")).fit(Tiny(), loader())
    with pytest.raises(ValueError, match="'conv9' matches no layer"):
        trainer(tmp_path, sparsity(dense=["conv9"])).fit(Tiny(), loader())
    with pytest.raises(ValueError, match=r"target 0\.99 cannot be reached"):
        trainer(tmp_path, sparsity(target=0.99)).fit(Tiny(), loader())
    with pytest.raises(ValueError, match="at least 1"):
        sparsity(interval=0)
    with pytest.raises(ValueError, match="choose one of l1, l2"):
        sparsity(score="l3")


def test_a_network_that_diverged_is_an_error(tmp_path):
    module = Tiny()
    module.lr = 1e30
    with pytest.raises(ValueError, match=r"\.weight: holds NaN or infinite weights"):
        trainer(tmp_path, sparsity()).fit(module, loader())


def test_resuming_with_other_settings_is_refused(tmp_path):
    trainer(tmp_path, sparsity(), every_step(tmp_path)).fit(Tiny(), loader())
    with pytest.raises(ValueError, match=r"target: 0\.5 in the checkpoint, 0\.4 here"):
        trainer(tmp_path, sparsity(target=0.4)).fit(
            Tiny(), loader(), ckpt_path=tmp_path / "step=3.ckpt"
        )


@pytest.mark.parametrize(
    "name", ["block8x8", "block8x8_per_position", "nm24", "vector_nm24", "unstructured"]
)
def test_the_configs_make_callbacks(tmp_path, name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(
            overrides=[
                f"+sparsity={name}",
                "sparsity.target=0.25",
                "sparsity/schedule=linear",
                "sparsity/allocation=targets",
                "sparsity.allocation.targets=[['5', 0.3]]",
                "sparsity.interval=1",
            ]
        )
    callback = instantiate(config.sparsity)
    trainer(tmp_path, callback).fit(Tiny(), loader())
    assert callback.finished
    assert {
        layer.name: layer.target >= wanted
        for layer, wanted in zip(callback.plan.pruned, (0.25, 0.3), strict=True)
    } == {"2": True, "5": True}


def test_unstructured_sparsity_is_exact(tmp_path):
    callback = sparsity(pattern=Unstructured(), target=0.9)
    trainer(tmp_path, callback).fit(Tiny(), loader())
    assert callback.plan.zeros == sum(int((~mask).sum()) for mask in callback.masks.values())

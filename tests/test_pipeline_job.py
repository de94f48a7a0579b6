"""The main job, small: what it writes, what it says, and going on after an interruption."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import blocksparse
from blocksparse.format import BsrWeight
from blocksparse.pipeline.folders import RunFolder
from blocksparse.pipeline.job import run
from blocksparse.pipeline.setup import build, build_data, build_network
from blocksparse.report import Report
from blocksparse.sparsity import checkpoint_masks
from blocksparse.training import load_weights, read_weights
from blocksparse.training.module import fingerprint

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = [
    "model.widths=[8,16,16]",
    "dense.epochs=2",
    "sparse.epochs=2",
    "sparsity.target=0.5",
    "sparsity.interval=2",
    "trainer=cpu",
    "trainer.limit_train_batches=6",
    "trainer.log_every_n_steps=1",
    "report.rounds=3",
    "report.min_seconds=0",
    "report.threads=1",
]

COMMAND = "python train.py sparsity.target=0.5"


class StopAt(Callback):
    """Break off when a number of steps are done, as a power cut would."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage = stage
        self.step = step

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        stage = Path(trainer.loggers[0].log_dir).name
        if stage == self.stage and trainer.global_step == self.step:
            raise RuntimeError("power cut")


def configuration(*overrides: str) -> DictConfig:
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [*SMALL, *overrides])


def weights(folder: RunFolder, stage: str) -> dict[str, torch.Tensor]:
    return read_weights(folder.checkpoint(stage))


def rows(folder: RunFolder, logs: str) -> list[dict[str, str]]:
    with (folder.path / "logs" / logs / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Report]:
    folder = RunFolder(tmp_path_factory.mktemp("whole"))
    return folder, run(configuration(), folder, command=COMMAND)


def test_writes_what_it_says_and_nothing_else(whole: tuple[RunFolder, Report]) -> None:
    folder, report = whole
    files = {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*.*")}
    files = {"logs/*/events" if "tfevents" in name else name for name in files if "." in name}
    assert files == {
        "config.yaml",
        "command.txt",
        "sparsity_plan.md",
        "sparsity_plan.json",
        "checkpoints/dense.ckpt",
        "checkpoints/last_dense.ckpt",
        "checkpoints/sparse.ckpt",
        "checkpoints/last_sparse.ckpt",
        "logs/dense/metrics.csv",
        "logs/dense/hparams.yaml",
        "logs/sparse/metrics.csv",
        "logs/sparse/hparams.yaml",
        "logs/*/events",
        "model.bsr.safetensors",
        "report.md",
        "report.json",
    }
    assert json.loads((folder.path / "report.json").read_text()) == report.to_dict()
    assert (folder.path / "report.md").read_text() == report.to_markdown()
    assert (report.command, report.seed) == (COMMAND, 0)
    assert folder.command.read_text() == COMMAND + "\n"
    assert folder.command.name in report.files


def test_saved_configuration_makes_the_same_run(whole: tuple[RunFolder, Report]) -> None:
    saved = OmegaConf.load(whole[0].config)
    assert OmegaConf.to_container(saved) == OmegaConf.to_container(configuration(), resolve=True)


def test_figures_are_those_of_the_files(whole: tuple[RunFolder, Report]) -> None:
    folder, report = whole
    assert report.sizes.dense_checkpoint == folder.checkpoint("dense").stat().st_size
    assert report.sizes.exported_file == folder.model.stat().st_size
    sparse = weights(folder, "sparse")
    pruned = list(checkpoint_masks(torch.load(folder.checkpoint("sparse"))))
    zeros = sum(int((sparse[name] == 0).sum()) for name in pruned)
    total = sum(sparse[name].numel() for name in pruned)
    assert report.sparsity.layers == len(pruned) > 0
    assert report.sparsity.reached == pytest.approx(zeros / total)
    assert report.sparsity.reached >= report.sparsity.target == 0.5
    model = blocksparse.read(folder.model)
    stored = sum(w.data.size for w in model.weights.values() if isinstance(w, BsrWeight))
    dropped = report.cost.parameters - report.cost.parameters_kept
    assert stored > 0
    assert dropped == zeros  # widths are multiples of 8: no ragged edges
    assert 0 < report.cost.flops_kept < report.cost.flops
    assert [latency.rounds for latency in report.latencies] == [3, 3, 3]
    assert report.threads == 1


def test_accuracies_are_those_of_the_networks(whole: tuple[RunFolder, Report]) -> None:
    folder, report = whole
    cfg = configuration()
    data = build_data(cfg)
    images, labels = next(iter(data.val_dataloader()))
    assert len(images) == report.accuracy.images == 360
    for stage, share in (("dense", report.accuracy.dense), ("sparse", report.accuracy.sparse)):
        network = build_network(cfg, data)
        network.load_state_dict(weights(folder, stage))
        with torch.no_grad():
            top = network.eval()(images).argmax(1)
        assert share == pytest.approx(float((top == labels).float().mean()))
    top = blocksparse.load(folder.model)(np.ascontiguousarray(images.numpy())).argmax(1)
    assert report.accuracy.runtime == pytest.approx(float((top == labels.numpy()).mean()))


def test_checkpoints_hold_weights_under_their_own_names(whole: tuple[RunFolder, Report]) -> None:
    folder, _ = whole
    dense = torch.load(folder.checkpoint("dense"), weights_only=True)
    sparse = torch.load(folder.checkpoint("sparse"), weights_only=True)
    assert set(dense) == {"state_dict"}
    assert list(dense["state_dict"]) == list(sparse["state_dict"])
    assert "layer1.0.conv1.weight" in dense["state_dict"]
    for name, mask in checkpoint_masks(sparse).items():
        assert not sparse["state_dict"][name][~mask].any()


def test_logs_hold_the_figures(whole: tuple[RunFolder, Report]) -> None:
    folder, _ = whole
    sparse = rows(folder, "sparse")
    names = {"train/loss", "val/accuracy", "lr", "sparsity", "density/layer3.0.conv2"}
    assert names <= set(sparse[0])
    assert {"train/loss", "val/accuracy", "lr"} <= set(rows(folder, "dense")[0])
    ramp = [float(row["sparsity"]) for row in sparse if row["sparsity"]]
    assert ramp == sorted(ramp)
    assert ramp[0] < ramp[-1] == 0.5
    events = EventAccumulator(str(folder.path / "logs" / "sparse")).Reload()
    assert names <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("stage", "step", "every", "saved"),
    [
        pytest.param("dense", 8, "epoch", 6, marks=pytest.mark.slow),
        ("sparse", 3, "step", 2),  # on the ramp, within an epoch
        pytest.param("sparse", 9, "step", 8, marks=pytest.mark.long),  # after the ramp
    ],
)
def test_goes_on_where_it_was_broken_off(
    stage: str,
    step: int,
    every: str,
    saved: int,
    whole: tuple[RunFolder, Report],
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "run")
    cfg = configuration(
        f"+callbacks.cut={{_target_:{__name__}.StopAt,stage:{stage},step:{step}}}",
        *(
            ["callbacks.last.every_n_epochs=null", "callbacks.last.every_n_train_steps=2"]
            if every == "step"
            else []
        ),
    )
    with pytest.raises(RuntimeError, match="power cut"):
        run(cfg, folder, command=COMMAND)
    assert not folder.checkpoint(stage).exists()
    cfg.callbacks.cut = None
    assert run(cfg, folder).command == COMMAND
    for name in ("dense", "sparse"):
        expected = weights(whole[0], name)
        for key, value in weights(folder, name).items():
            assert torch.equal(value, expected[key]), (name, key)
    # It went on rather than began anew, and the rows of the first attempt are still there.
    assert int(rows(folder, f"{stage}_2")[0]["step"]) == saved
    assert int(rows(folder, stage)[0]["step"]) == 0


@pytest.mark.slow
def test_finished_run_is_only_measured_again(
    whole: tuple[RunFolder, Report], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(whole[0].path, folder.path)
    folder.model.unlink()
    folder.command.unlink()  # as runs of earlier versions are
    before = folder.checkpoint("sparse").read_bytes()
    report = run(configuration(), folder)
    assert report.accuracy == whole[1].accuracy
    assert (report.command, report.seed) == ("", 0)
    assert folder.command.name not in report.files
    assert folder.checkpoint("sparse").read_bytes() == before
    assert folder.model.read_bytes()
    assert not (folder.path / "logs" / "sparse_2").exists()


@pytest.mark.slow
def test_given_weights_replace_the_dense_training(
    whole: tuple[RunFolder, Report], tmp_path: Path
) -> None:
    source = whole[0].checkpoint("dense")
    folder = RunFolder(tmp_path / "run")
    run(configuration(f"model.weights={source}"), folder)
    assert not (folder.path / "logs" / "dense").exists()
    for name, value in weights(folder, "sparse").items():
        assert torch.equal(value, weights(whole[0], "sparse")[name]), name


@pytest.mark.slow
def test_an_interrupted_second_pruning_is_gone_on_with(
    whole: tuple[RunFolder, Report], tmp_path: Path
) -> None:
    """And the weights it all began with may be gone by then."""
    given = tmp_path / "given.ckpt"
    shutil.copy(whole[0].checkpoint("dense"), given)
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(whole[0].path, folder.path)
    given.unlink()
    stop = f"+callbacks.cut={{_target_:{__name__}.StopAt,stage:sparse_2,step:7}}"
    cfg = configuration(f"model.weights={given}", "seed=1", stop)
    with pytest.raises(RuntimeError, match="power cut"):
        run(cfg, folder, checkpoint=folder.checkpoint("dense"))
    assert not folder.checkpoint("sparse").exists()
    cfg.callbacks.cut = None
    run(cfg, folder)
    old = weights(whole[0], "sparse")
    assert any(not torch.equal(old[k], v) for k, v in weights(folder, "sparse").items())


@pytest.mark.slow
def test_teacher_has_the_order_of_the_permuted_network(tmp_path: Path) -> None:
    cfg = configuration("permutation=greedy", "sparse.epochs=1", "distillation.features=1")
    folder = RunFolder(tmp_path)
    run(cfg, folder)
    network = build_network(cfg, build_data(cfg))
    load_weights(network, weights(folder, "dense"), source="dense")
    unordered = fingerprint(network)
    plan = build(cfg.sparsity).plan_for(network)
    build(cfg.permutation)(network, plan, build_data(cfg).input_shape)
    assert fingerprint(network) != unordered
    checkpoint = torch.load(folder.last("sparse"), weights_only=True)
    assert checkpoint["teacher"] == fingerprint(network)
    errors = [row["train/feature_error"] for row in rows(folder, "sparse")]
    assert all(0 < float(error) < 1 for error in errors if error)
    assert any(errors)


@pytest.mark.long
def test_permuted_run_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    permuted = ["permutation=greedy", "dense.epochs=1", "distillation.features=1"]
    folder = RunFolder(tmp_path / "whole")
    report = run(configuration(*permuted), folder)
    gain = json.loads((folder.path / "permutation.json").read_text())
    assert gain["after"] > gain["before"]
    assert "permutation.md, .json" in report.files
    assert report.accuracy.sparse == report.accuracy.runtime
    cut = RunFolder(tmp_path / "cut")
    stop = f"+callbacks.cut={{_target_:{__name__}.StopAt,stage:sparse,step:7}}"
    cfg = configuration(*permuted, stop)
    with pytest.raises(RuntimeError, match="power cut"):
        run(cfg, cut)
    cfg.callbacks.cut = None
    run(cfg, cut)
    for name in ("dense", "sparse"):
        for key, value in weights(cut, name).items():
            assert torch.equal(value, weights(folder, name)[key]), (name, key)


@pytest.mark.long
def test_default_job_reaches_its_accuracy(tmp_path: Path) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train")
    report = run(cfg, RunFolder(tmp_path))
    assert report.accuracy.dense >= 0.97
    assert report.accuracy.sparse >= report.accuracy.dense - 0.01
    assert report.accuracy.runtime >= report.accuracy.dense - 0.01
    assert report.sparsity.reached >= 0.75
    assert report.sizes.exported_file < report.sizes.dense_checkpoint / 3

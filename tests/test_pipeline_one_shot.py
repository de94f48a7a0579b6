"""Pruning in one shot through the main job: without training, and as the start of one."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from blocksparse.pipeline.folders import RunFolder
from blocksparse.pipeline.job import run
from blocksparse.pipeline.measure import accuracy
from blocksparse.pipeline.setup import build, build_data, build_network, check
from blocksparse.report import Report
from blocksparse.sparsity import MaskedWeights, checkpoint_masks, checkpoint_plan
from blocksparse.training import read_weights

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = [
    "model.widths=[8,16,16]",
    "dense.epochs=2",
    "sparse.epochs=0",
    "calibration=obs",
    "sparsity=block8x8_per_position",
    "sparsity.target=0.4",
    "trainer=cpu",
    "threads=1",
    "report.rounds=3",
    "report.min_seconds=0",
    "report.threads=1",
]


def configuration(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Report]:
    folder = RunFolder(tmp_path_factory.mktemp("one_shot"))
    return folder, run(configuration(), folder)


def by_magnitude(folder: RunFolder) -> float:
    """Return the accuracy with the same targets, zeros where magnitude puts them, and no more."""
    cfg = configuration()
    data = build_data(cfg)
    network = build_network(cfg, data)
    network.load_state_dict(read_weights(folder.checkpoint("dense")))
    masked = MaskedWeights(build(cfg.sparsity).plan_for(network))
    masked.adopt(masked.build(network, 1.0))
    masked.impose(network)
    return accuracy(network, data.val_dataloader())


def test_prunes_without_training(untrained: tuple[RunFolder, Report]) -> None:
    folder, report = untrained
    sparse = torch.load(folder.checkpoint("sparse"), weights_only=True)
    plan = checkpoint_plan(sparse)
    assert plan is not None
    for name, mask in checkpoint_masks(sparse).items():
        assert not sparse["state_dict"][name][~mask].any()
    assert report.sparsity.reached >= 0.4
    assert report.accuracy.sparse > by_magnitude(folder) + 0.05
    assert report.accuracy.runtime == pytest.approx(report.accuracy.sparse, abs=0.003)
    names = {path.name for path in folder.path.iterdir()}
    assert {"sparsity_plan.json", "sparsity_plan.md", "model.bsr.safetensors"} <= names
    assert not folder.last("sparse").exists()
    # A finished run is only measured again.
    before = folder.checkpoint("sparse").read_bytes()
    run(configuration(), folder)
    assert folder.checkpoint("sparse").read_bytes() == before


@pytest.mark.slow
def test_training_keeps_the_masks_from_its_first_step(
    untrained: tuple[RunFolder, Report], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    weights = untrained[0].checkpoint("dense")
    run(
        configuration(
            f"model.weights={weights}",
            "sparse.epochs=1",
            "trainer.limit_train_batches=4",
            "trainer.log_every_n_steps=1",
        ),
        folder,
    )
    trained = torch.load(folder.checkpoint("sparse"), weights_only=True)
    start = torch.load(untrained[0].checkpoint("sparse"), weights_only=True)
    for name, mask in checkpoint_masks(trained).items():
        assert torch.equal(mask, checkpoint_masks(start)[name])
        assert not trained["state_dict"][name][~mask].any()
    name = "layer1.0.conv1.weight"
    assert not torch.equal(trained["state_dict"][name], start["state_dict"][name])
    with (folder.path / "logs" / "sparse" / "metrics.csv").open(encoding="utf-8") as file:
        logged = {row["sparsity"] for row in csv.DictReader(file) if row["sparsity"]}
    assert len(logged) == 1  # the ramp is over before it begins


def test_calibration_is_checked_before_anything_is_written() -> None:
    check(configuration())
    with pytest.raises(ValueError, match=r"calibration\.damping is 0"):
        check(configuration("calibration.damping=0"))
    with pytest.raises(ValueError, match=r"at least 1, or 0 in one shot \(calibration=obs\)"):
        check(configuration("calibration=none"))


@pytest.mark.long
def test_resnet56_without_training(tmp_path: Path) -> None:
    """8x8 per position at 30 %: magnitude, with zeros put in and no more, has 66 % right."""
    root, weights = (
        os.environ.get("BLOCKSPARSE_CIFAR10"),
        os.environ.get("BLOCKSPARSE_CIFAR10_WEIGHTS"),
    )
    if not root or not weights:
        pytest.skip(
            "set BLOCKSPARSE_CIFAR10 and BLOCKSPARSE_CIFAR10_WEIGHTS, see test_training_weights"
        )
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(
            "train",
            [
                "experiment=cifar10_resnet56_one_shot",
                f"data.root={root}",
                f"model.weights={weights}/cifar10_resnet56.safetensors",
            ],
        )
    report = run(cfg, RunFolder(tmp_path))
    assert report.sparsity.reached >= 0.3
    assert report.accuracy.sparse > report.accuracy.dense - 0.02

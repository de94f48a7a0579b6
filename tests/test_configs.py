"""Every option of every group composes, and every experiment takes real training steps."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from blocksparse.pipeline.folders import RunFolder
from blocksparse.pipeline.setup import build, build_data, build_network, check
from blocksparse.pipeline.stages import Stage

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
# Where train.yaml puts a group, if not under its own name.
PLACES = {"optimizer": ["optimizer@dense.optimizer", "optimizer@sparse.optimizer"]}
# The smallest images that a network can be trained on, if not 32 pixels.
SMALLEST = {"inception_v3": 299}


# Seconds each where the others take one.
SLOW = {"cifar10_resnet18_block8x8", "imagenet_resnet50_block8x8"}
# Half a minute and more together on one core.
LONG = {
    "imagenet_inception_v3_block8x8",
    "imagenet_resnet50_nm24",
    "imagenet_vgg16_block8x8",
}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


def options() -> list[str]:
    found = []
    for path in sorted(CONFIGS.rglob("*.yaml")):
        group = path.relative_to(CONFIGS).parent.as_posix()
        if group == "." or group.startswith("hydra"):
            continue
        found += [f"{place}={path.stem}" for place in PLACES.get(group, [group])]
    return found


@pytest.mark.parametrize("option", options())
def test_option_composes(option: str) -> None:
    cfg = composed(option)
    if "sparsity=base" in option:  # what the patterns have in common; it has none itself
        assert "pattern" not in cfg.sparsity
    # Whatever refers to another key finds it.
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    assert plain["data"]["seed"] == plain["seed"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_says_how_to_run_it(name: str) -> None:
    lines = (CONFIGS / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"  # Hydra reads it from the first line only
    command = re.fullmatch(r"# python train\.py(?: experiment=(\w+))?( \S+=\S+)*", lines[1])
    assert command, lines[1]
    assert (command[1] or composed().name) == name
    assert composed(f"experiment={name}").name == name


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (name in SLOW) + [pytest.mark.long] * (name in LONG)


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in EXPERIMENTS])
def test_experiment_takes_training_steps(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    cfg = composed(f"experiment={name}", "model.weights=null")
    network = cfg.model.name
    channels = 1 if "Digits" in cfg.data._target_ else 3
    side = SMALLEST.get(network, 32)
    big = "imagenet" in name
    batch, steps = (2, 1) if big else (4, 2)
    small = composed(
        "data=fake",
        "trainer=cpu",
        f"data.input_shape=[{channels},{side},{side}]",
        "data.num_classes=4",
        f"data.train_size={batch * steps}",
        f"data.val_size={batch}",
        f"data.batch_size={batch}",
    )
    cfg.data, cfg.trainer = small.data, small.trainer
    cfg.sparse.epochs = 1
    cfg.callbacks.last = None  # would write gigabytes
    if network in ("vgg16", "inception_v3"):
        cfg.model.options = {"init_weights": False}  # minutes of drawing, for one step
    check(cfg)
    data = build_data(cfg)
    student = build_network(cfg, data)
    teacher = copy.deepcopy(student)
    callback = build(cfg.sparsity, save_dir=str(tmp_path))
    Stage(cfg, "sparse", RunFolder(tmp_path)).fit(
        student, data, teacher=teacher, callbacks=[callback]
    )
    # The ramp has ended within the epoch: the weights moved, and have the sparsity asked for.
    assert not torch.equal(next(student.parameters()), next(teacher.parameters()))
    weights = callback.plan.weights(student).values()
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / callback.plan.prunable == pytest.approx(cfg.sparsity.target, abs=0.01)


def test_help_lists_groups_and_examples() -> None:
    text = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    for group in ("data", "model", "sparsity", "distillation", "trainer", "experiment"):
        assert re.search(rf"^{group}: ", text, re.MULTILINE), group
    for example in re.findall(r"^    python train\.py ([^ ].*?)  ", text, re.MULTILINE):
        if example.startswith(("-m", "resume")):
            continue
        composed(*example.split())  # every example can be typed
    assert "sparsity.target" in text

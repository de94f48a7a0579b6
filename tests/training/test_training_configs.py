"""Each file of the groups data, model, optimizer, distillation, batchnorm makes what it says."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from blocksparse.training import (
    BatchNormReestimation,
    Digits,
    Distillation,
    ImageData,
    Optimization,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def files(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(group: str, name: str, **overrides: object) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose(
            overrides=[
                "+seed=3",
                f"+{group}={name}",
                *(f"{group}.{key}={value}" for key, value in overrides.items()),
            ]
        )
    return config.get(group)


@pytest.fixture
def images(tmp_path):
    """A folder of one-colour images that suits every folder config."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            where = tmp_path / part / name
            where.mkdir(parents=True)
            Image.fromarray(np.full((40, 50, 3), 7, np.uint8)).save(where / "0.png")
    return tmp_path


@pytest.mark.parametrize("name", files("data"))
def test_data(name, images, tmp_path):
    overrides = {"num_workers": 0}
    if "cifar" in name or "folder" in name or name == "imagenet":
        overrides["root"] = images
    config = composed("data", name, **overrides)
    if config["_target_"].endswith(("Cifar10", "Cifar100")):
        (images / get_class(config["_target_"]).dataset.base_folder).mkdir()
        data = instantiate(config)
        assert data.input_shape == (3, 32, 32)
        return
    data = instantiate(config)
    assert isinstance(data, ImageData)
    assert data.seed == 3
    pictures, labels = next(iter(data.val_dataloader()))
    assert pictures.shape[1:] == data.input_shape
    assert pictures.dtype == torch.float32
    assert int(labels.max()) < data.num_classes


@pytest.mark.parametrize("name", files("model"))
def test_model(name):
    config = composed("model", name)
    if name == "torchvision":
        config.name = "squeezenet1_1"
    shape = (3, 64, 64) if name == "torchvision" else (1, 8, 8)
    model = instantiate(config, num_classes=4, input_shape=shape)
    assert model.eval()(torch.zeros(1, *shape)).shape == (1, 4)


@pytest.mark.parametrize("name", files("optimizer"))
def test_optimizer(name):
    recipe = instantiate(composed("optimizer", name))
    assert isinstance(recipe, Optimization)
    optimizer = recipe.make_optimizer(torch.nn.Linear(2, 2))
    assert optimizer.param_groups[0]["lr"] == recipe.lr


def test_distillation_and_batchnorm():
    assert isinstance(instantiate(composed("distillation", "dense")), Distillation)
    assert isinstance(instantiate(composed("batchnorm", "reestimate")), BatchNormReestimation)
    for group in ("distillation", "batchnorm"):
        assert not composed(group, "none")


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, name)
        for group in ("data", "model", "optimizer", "distillation", "batchnorm")
        for name in files(group)
    ],
)
def test_each_key_is_an_argument_and_each_has_a_comment(group, name):
    config = composed(group, name)
    if not config:
        return
    target = get_method(config["_target_"])
    known = set(inspect.signature(target).parameters)
    assert set(config) - {"_target_"} <= known
    text = (CONFIGS / group / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    if "defaults" not in yaml.safe_load(text):
        # A file that builds on no other shows every knob it has.
        given = {"classes", "num_classes", "input_shape"} if group == "model" else set()
        other = {"options"} if "cifar" in name else {"widths"}
        assert known - given - other == set(config) - {"_target_"}


def test_defaults_in_code_are_those_in_the_configs():
    config = OmegaConf.to_container(composed("data", "digits"))
    signature = inspect.signature(Digits).parameters
    for key, value in config.items():
        if key not in ("_target_", "seed"):
            default = signature[key].default
            assert (list(default) if isinstance(default, tuple) else default) == value, key

"""Weights from files: strictly, and without running code."""

from __future__ import annotations

import os
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainers import quiet_trainer

from blocksparse.training import (
    Classifier,
    Digits,
    ImageFolder,
    ResNetCifar,
    WeightsError,
    build_model,
    load_weights,
    read_weights,
)
from blocksparse.training.weights import check_whole


def network(seed: int = 0, num_classes: int = 10) -> ResNetCifar:
    torch.manual_seed(seed)
    return ResNetCifar(1, num_classes, in_channels=1, widths=(4, 4, 8))


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    state, wanted = model.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(state[name], value), name


def build(weights: Path, **options) -> torch.nn.Module:
    settings = {"num_classes": 10, "input_shape": (1, 8, 8), "widths": (4, 4, 8), **options}
    return build_model("resnet8", weights=weights, **settings)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "args": {"lr": 0.1}},
        lambda state: {"net": state, "acc": 93.1, "epoch": 3},
        lambda state: {"model_ema": state},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {f"module.model.{k}": v for k, v in state.items()},
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt"])
def test_torch_files(tmp_path, wrap, suffix):
    model = network()
    torch.save(wrap(model.state_dict()), tmp_path / f"weights{suffix}")
    assert_same(build(tmp_path / f"weights{suffix}"), model)
    assert_same(build(str(tmp_path / f"weights{suffix}")), model)


def test_safetensors_file(tmp_path):
    model = network()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert_same(build(tmp_path / "weights.safetensors"), model)


def test_lightning_checkpoint(tmp_path):
    module = Classifier(network())
    trainer = quiet_trainer(
        max_steps=1,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=Digits(batch_size=8))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert_same(build(tmp_path / "last.ckpt"), module.model)


class Weighted(pl.LightningModule):
    """A user's module: the network, a loss with weights, and a metric."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, network())
        self.criterion = torch.nn.CrossEntropyLoss(weight=torch.ones(10))


@pytest.mark.parametrize("name", ["model", "net", "backbone"])
def test_what_a_checkpoint_holds_besides_the_network_is_named_and_ignored(tmp_path, caplog, name):
    module = Weighted(name)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    assert_same(build(tmp_path / "last.ckpt"), module.get_submodule(name))
    assert f"named {name}.*; ignored: criterion.weight" in caplog.text


def test_under_a_prefix_everything_must_fit_too(tmp_path):
    state = Weighted("model").state_dict()
    del state["model.bn1.bias"]
    state["model.fc.bias"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    with pytest.raises(WeightsError) as caught:
        build(tmp_path / "last.ckpt")
    text = str(caught.value)
    assert "last.ckpt, under model.*, does not fit ResNetCifar" in text
    assert "missing in the file (1): bn1.bias" in text
    assert "unexpected in the file (1): fc.bias" in text
    assert "besides model.* in the file (1): criterion.weight" in text


def test_two_networks_in_one_file_are_told_apart_by_what_fits(tmp_path):
    student, teacher = network(1), ResNetCifar(2, 10, 1, (4, 4, 8))
    state = {f"teacher.{n}": v for n, v in teacher.state_dict().items()}
    state |= {f"student.{n}": v for n, v in student.state_dict().items()}
    torch.save(state, tmp_path / "both.pth")
    assert_same(build(tmp_path / "both.pth"), student)
    wide = {f"a.{n}": torch.zeros(99) for n in student.state_dict()}  # other shapes alone
    narrow = {f"b.{n}": v for n, v in student.state_dict().items()}
    load_weights(model := network(2), wide | narrow, "both.pth")
    assert_same(model, student)


def test_one_of_two_networks_that_fit_is_never_picked():
    state = {f"{p}.{n}": v for p in ("ema", "model") for n, v in network().state_dict().items()}
    with pytest.raises(WeightsError, match=r"holds 2 networks .* under ema\.\*, model\.\*"):
        load_weights(network(), state, "both.pth")


def test_num_batches_tracked_may_be_missing(tmp_path):
    state = {k: v for k, v in network().state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "weights.safetensors")
    model = build(tmp_path / "weights.safetensors")
    assert torch.equal(model.state_dict()["layer3.0.conv2.weight"], state["layer3.0.conv2.weight"])


def test_nothing_else_may(tmp_path):
    state = network().state_dict()
    del state["bn1.running_mean"], state["linear.bias"]
    state["fc.bias"] = torch.zeros(10)
    state["conv1.weight"] = torch.zeros(4, 3, 3, 3)
    model = network(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, state, "old.pth")
    text = str(caught.value)
    assert "old.pth does not fit ResNetCifar" in text
    assert "missing in the file (2): bn1.running_mean; linear.bias" in text
    assert "unexpected in the file (1): fc.bias" in text
    assert "conv1.weight (4, 3, 3, 3), expected (4, 1, 3, 3)" in text
    assert "Check that model.name" in text
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("bn1.bias"), "missing in the file (1): bn1.bias"),
        (lambda state: state.update(new=torch.ones(1)), "unexpected in the file (1): new"),
        (lambda state: state.update({"bn1.bias": torch.ones(5)}), "bn1.bias (5,), expected (4,)"),
    ],
)
def test_each_difference_alone_is_an_error(change, text):
    state = dict(network().state_dict())
    change(state)
    with pytest.raises(WeightsError, match=re.escape(text)):
        load_weights(network(), state, "changed.pth")


def test_long_lists_are_cut():
    with pytest.raises(WeightsError, match=r"missing in the file \(\d\d\): .*\.\.\. and \d+ more"):
        load_weights(network(), {}, "empty.pth")


def test_other_number_of_classes(tmp_path):
    model = network(num_classes=7)
    torch.save(model.state_dict(), tmp_path / "seven.pth")
    with pytest.raises(
        WeightsError, match=r"trained for 7 classes, the network has 10: set model.new"
    ):
        build(tmp_path / "seven.pth")
    torch.manual_seed(5)
    loaded = build(tmp_path / "seven.pth", new_classifier=True).state_dict()
    assert loaded["linear.weight"].shape == (10, 8)
    assert torch.equal(loaded["conv1.weight"], model.conv1.weight)


def test_new_classifier_excuses_nothing_else(tmp_path):
    torch.save(ResNetCifar(1, 7, 1, (4, 8, 8)).state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"layer2\.0\.conv1\.weight"):
        build(tmp_path / "other.pth", new_classifier=True)
    # As many filters as classes, but made for three channels.
    torch.save(ResNetCifar(1, 10, 3, (4, 4, 8)).state_dict(), tmp_path / "colour.pth")
    with pytest.raises(
        WeightsError, match=r"conv1\.weight \(4, 3, 3, 3\), expected \(4, 1, 3, 3\)"
    ):
        build(tmp_path / "colour.pth", num_classes=4, new_classifier=True)


class Payload:
    """What a hostile file would have unpickled."""

    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def test_a_file_never_runs_code(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"state_dict": {}, "x": Payload(str(marker))}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth: is damaged, or holds Python objects"):
        read_weights(tmp_path / "evil.pth")
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 3, 0.5])
def test_cut_short(tmp_path, suffix, keep):
    path = tmp_path / f"weights{suffix}"
    state = network().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(WeightsError, match=f"weights{suffix}: "):
        read_weights(path)


@pytest.mark.parametrize("content", [b"junk", b"PK", bytes(range(256))])
def test_junk(tmp_path, content):
    (tmp_path / "weights.ckpt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.ckpt: is damaged"):
        read_weights(tmp_path / "weights.ckpt")


@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "junk"])
def test_a_checkpoint_that_nothing_can_go_on_from_is_found(tmp_path, damage):
    path = tmp_path / "last_sparse.ckpt"
    torch.save({"state_dict": network().state_dict(), "epoch": 3}, path)
    content = bytearray(path.read_bytes())
    if damage == "none":
        check_whole(path)
        return
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-30], "flipped": content, "junk": b"junk"}[damage])
    with pytest.raises(WeightsError, match=r"last_sparse\.ckpt: is damaged .* Remove it"):
        check_whole(path)


def test_not_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.pth: there is no such weights file"):
        read_weights(tmp_path / "no.pth")
    with pytest.raises(WeightsError, match=r"named \.pth, \.pt, \.ckpt, \.safetensors"):
        read_weights(tmp_path / "weights.onnx")
    torch.save({"epoch": 3}, tmp_path / "empty.ckpt")
    with pytest.raises(WeightsError, match=r"no weights found.* At its top are: epoch$"):
        read_weights(tmp_path / "empty.ckpt")


def published(name: str) -> Path:
    """Return the path of a published CIFAR ResNet, or skip."""
    folder = os.environ.get("BLOCKSPARSE_CIFAR10_WEIGHTS")
    path = Path(folder or ".", f"cifar10_{name}.safetensors")
    if not folder or not path.is_file():
        pytest.skip(
            "set BLOCKSPARSE_CIFAR10_WEIGHTS to a folder with cifar10_resnet20.safetensors, ..."
        )
    return path


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet44", "resnet56"])
def test_published_cifar_resnets_load(name):
    path = published(name)
    model = build_model(name, num_classes=10, input_shape=(3, 32, 32), weights=path)
    assert set(load_file(path)) <= set(model.state_dict())


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "accuracy"),
    [("resnet20", 0.9173), ("resnet32", 0.9263), ("resnet44", 0.9310), ("resnet56", 0.9339)],
)
def test_published_cifar_resnets_are_as_accurate_as_on_the_whole_test_set(name, accuracy):
    path = published(name)
    root = os.environ.get("BLOCKSPARSE_CIFAR10")
    if not root or not Path(root, "val").is_dir():
        pytest.skip("set BLOCKSPARSE_CIFAR10 to a folder with train/<class> and val/<class> images")
    data = ImageFolder(root=root, size=32, resize=None, in_memory=False, batch_size=500)
    model = build_model(name, num_classes=10, input_shape=(3, 32, 32), weights=path).eval()
    right = seen = 0
    with torch.inference_mode():
        for images, labels in data.val_dataloader():
            right += int((model(images).argmax(1) == labels).sum())
            seen += len(labels)
    # Two standard deviations of an accuracy measured on half of that set.
    assert abs(right / seen - accuracy) < 2 * (accuracy * (1 - accuracy) / 5000) ** 0.5

"""A whole export: the file, its report, and what happens when the file is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from export_networks import prune_blocks, prune_groups, randomized
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from blocksparse.export import VerificationError, WeightError, export_file
from blocksparse.export import file as export_file_module
from blocksparse.export.report import ExportReport, Verification
from blocksparse.format import BsrWeight, NMWeight, Preprocessing
from blocksparse.format.reader import read
from blocksparse.format.writer import write
from blocksparse.runtime import load
from blocksparse.runtime.tolerance import tolerance
from blocksparse.sparsity.patterns import Block
from blocksparse.training import ResNetCifar


def images(count: int, *shape: int) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def small() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
    return randomized(
        nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    )


@pytest.mark.slow
def test_cifar_resnet(tmp_path):
    model = randomized(ResNetCifar(3))
    prune_blocks(model, 0.5)
    report = export_file(model, tmp_path / "net.bsr.safetensors", images(3, 3, 16, 16))
    nodes = load(report.path).model.graph.nodes
    assert [node.op for node in nodes].count("conv2d") == 19
    assert {node.op for node in nodes} == {
        "conv2d", "slice", "pad", "adaptive_avg_pool2d", "flatten", "linear"
    }  # fmt: skip
    layouts = {row.name: row.layout for row in report.layers}
    assert layouts["layer2.0.conv1"] == "bsr 8x8"
    assert report.ratio < 0.6


@pytest.mark.slow
def test_squeezenet(tmp_path):
    model = randomized(torchvision.models.squeezenet1_1(num_classes=12))
    prune_groups(model, 2, 4)
    report = export_file(model, tmp_path / "net.bsr.safetensors", images(2, 3, 40, 40))
    model = read(report.path)
    assert isinstance(model.weights["features.3.squeeze"], NMWeight)
    assert model.graph.shapes[model.graph.outputs[0]] == (12,)
    assert report.verification.same_argmax == report.verification.images == 3
    # n/m of the dense values, 2 bits for each, and the header.
    assert report.ratio < (0.5 + 0.5 * 2 / 32) * 1.02


@pytest.mark.parametrize("key", ["path", "report_path"])
def test_a_place_below_a_file_is_refused_before_anything_is_replaced(tmp_path, key):
    paths = {"path": tmp_path / "net.bsr.safetensors", "report_path": tmp_path / "report.json"}
    for path in paths.values():
        path.write_text("as it was")
    below = {**paths, key: tmp_path / "report.json" / "folder" / "file"}
    with pytest.raises(NotADirectoryError, match=r"report\.json is a file, not a folder"):
        export_file(nn.Flatten(), inputs=images(1, 3, 8, 8), **below)
    assert [path.read_text() for path in paths.values()] == ["as it was"] * 2


@pytest.mark.parametrize("key", ["path", "report_path"])
def test_a_folder_is_no_file_to_write(tmp_path, key):
    paths = {"path": tmp_path / "net.bsr.safetensors", key: tmp_path}
    with pytest.raises(IsADirectoryError, match="is a folder; name the file"):
        export_file(nn.Identity(), paths.pop("path"), images(1, 3, 8, 8), **paths)
    assert not list(tmp_path.iterdir())


def test_report_adds_up(tmp_path):
    model = small()
    prune_blocks(model, 0.6, seed=1)
    model[0].weight.data[0, 0, 0, 0] = 1e-39
    path = tmp_path / "deep" / "net.bsr.safetensors"
    report = export_file(
        model,
        path,
        images(2, 3, 8, 8),
        patterns={"3.weight": Block(8, 8)},
        classes=["a", "b", "c", "d"],
        preprocessing={
            "resize": 8, "crop": [8, 8], "mean": [0, 0.1, 0], "std": (1, 1, 2), "channels": "rgb"
        },
        provenance={"config": {"seed": 1}},
        report_path=tmp_path / "reports" / "report.json",
    )  # fmt: skip
    assert report.file_bytes == path.stat().st_size
    parts = report.values_bytes + report.indices_bytes + report.metadata_bytes
    assert parts == report.file_bytes
    assert report.dense_bytes == 4 * sum(p.numel() for p in (model[3].weight, model[0].weight)) + (
        4 * (16 + 16 + 4 + 16 * 4)
    )
    assert report.flushed == 1
    assert [row.name for row in report.layers] == ["0", "3", "6"]
    assert sum(row.bytes for row in report.layers) + 4 * (16 + 16 + 4) == (
        report.values_bytes + report.indices_bytes
    )
    assert 0 < report.verification.max_error <= report.verification.tolerance
    assert report.table()[-1]["layer"] == "file"
    assert len({tuple(row) for row in report.table()}) == 1
    saved = json.loads((tmp_path / "reports" / "report.json").read_text())
    assert saved["layers"][1]["reason"] == report.layers[1].reason
    stored = read(path)
    assert stored.classes == ("a", "b", "c", "d")
    assert stored.preprocessing == Preprocessing(8, (8, 8), (0, 0.1, 0), (1, 1, 2), "rgb")
    assert stored.provenance["config"] == {"seed": 1}
    assert stored.provenance["exporter"]["torch"] == torch.__version__


def test_a_report_is_whole_or_the_one_before(tmp_path, monkeypatch):
    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:20])
        raise OSError("disk full")

    report = ExportReport(tmp_path / "x", (), 0, 0, 0, 1, 1, 0, Verification(1, 1, 0, 1, 1, "e"))
    path = tmp_path / "report.json"
    report.save(path)
    older = path.read_text()
    monkeypatch.setattr(Path, "write_bytes", half)
    monkeypatch.setattr(Path, "write_text", lambda path, text, **_: half(path, text.encode()))
    with pytest.raises(OSError, match="disk full"):
        report.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]
    assert path.read_text() == older


def test_block_key_is_used(tmp_path):
    model = small()
    prune_blocks(model, 0.8, seed=3)
    path = tmp_path / "net.bsr.safetensors"
    export_file(model, path, images(1, 3, 8, 8), block=(4, 8))
    weight = read(path).weights["3"]
    assert isinstance(weight, BsrWeight)
    assert weight.block == (4, 8)


def test_validation_accuracy_of_both(tmp_path):
    model = small()
    x = images(70, 3, 8, 8)
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[:7] = (labels[:7] + 1) % 4
    loader = DataLoader(TensorDataset(x, labels), batch_size=40)
    report = export_file(model, tmp_path / "net.bsr.safetensors", x[:5], val_loader=loader)
    check = report.verification
    assert (check.val_images, check.images) == (70, 1 + 5 + 70)
    assert check.accuracy_torch == check.accuracy_runtime == pytest.approx(0.9)


@pytest.mark.parametrize("together", [7, 2**18])
def test_values_below_the_smallest_normal_are_flushed(tmp_path, monkeypatch, together):
    monkeypatch.setattr("blocksparse.export.pack._TOGETHER", together)
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Flatten()).eval()
    # The scale of the batch norm brings values below; the blocks they fill become zero blocks.
    model[0].weight.data[:8] = 1e-30
    model[0].bias.data[:8] = -1e-30
    model[1].running_var[:8] = 1e20
    model[1].weight.data[8:] = 1e-45  # itself not normal
    report = export_file(model, tmp_path / "net.bsr.safetensors", images(1, 16, 4, 4))
    stored = read(report.path)
    arrays = [stored.weights["0"].to_dense(), stored.vectors["0.bias"]]
    for array in arrays:
        assert not ((array != 0) & (np.abs(array) < np.finfo(np.float32).tiny)).any()
    assert report.flushed == 8 * 16 + 8  # and the biases; the others are zero when rounded
    assert stored.weights["0"].nnz == 0


def broken_writer(path, model):
    """Write the model with one value of one weight changed by a percent of the largest."""
    name = next(iter(model.weights))
    values = model.weights[name].to_dense()
    values.flat[0] += 0.05 * np.abs(values).max()
    weight = type(model.weights[name]).from_dense(values)
    write(path, type(model)(model.graph, {**model.weights, name: weight}, model.vectors))


@pytest.mark.parametrize("older", [None, b"older file"])
def test_a_wrong_file_is_never_announced(tmp_path, monkeypatch, older):
    path = tmp_path / "net.bsr.safetensors"
    if older:
        path.write_bytes(older)
    monkeypatch.setattr(export_file_module, "write", broken_writer)
    with pytest.raises(VerificationError, match="is not what was written"):
        export_file(small(), path, images(2, 3, 8, 8))
    assert [entry.name for entry in tmp_path.iterdir()] == ([path.name] if older else [])
    assert older is None or path.read_bytes() == older


def test_logits_that_differ_are_an_error(tmp_path, monkeypatch):
    """A lowering that is wrong by 0.1 % in one batch norm is noticed by the logits."""
    from blocksparse.export import rules_products

    exact = rules_products.batch_norm

    def wrong(lowering, node, args):
        return exact(lowering, node, {**args, "eps": args["eps"] + 1e-3})

    monkeypatch.setitem(
        __import__("blocksparse.export.lower", fromlist=["RULES"]).RULES,
        "aten._native_batch_norm_legit_no_training",
        wrong,
    )
    path = tmp_path / "net.bsr.safetensors"
    with pytest.raises(
        VerificationError,
        match=r"logits of 1 images differ .* by up to [\d.e-]+; rounding explains",
    ):
        export_file(small(), path, images(2, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_model_that_gives_nan_is_an_error(tmp_path):
    model = small()
    model[6].weight.data[:] = 3e38
    with pytest.raises(VerificationError, match="the model itself gives NaN or infinity"):
        export_file(model, tmp_path / "net.bsr.safetensors", images(2, 3, 8, 8) * 100)
    assert not list(tmp_path.iterdir())


def test_a_failing_export_leaves_nothing(tmp_path):
    model = small()
    model[0].weight.data[0] = float("nan")
    with pytest.raises(WeightError, match=r"0\.weight"):
        export_file(model, tmp_path / "net.bsr.safetensors", images(2, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_provenance_comes_back_as_json_says_it(tmp_path):
    path = tmp_path / "net.bsr.safetensors"
    given = {"input_shape": (3, 8, 8), "epochs": {1: "warm", 2: ("a", None)}}
    export_file(small(), path, images(1, 3, 8, 8), provenance=given)
    stored = read(path).provenance
    assert stored["input_shape"] == [3, 8, 8]
    assert stored["epochs"] == {"1": "warm", "2": ["a", None]}


def test_provenance_that_json_cannot_hold_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^provenance: cannot .* PosixPath .*\(give texts"):
        export_file(small(), tmp_path / "x", images(1, 3, 8, 8), provenance={"data": [tmp_path]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 8, 8)])
def test_inputs_must_be_images(tmp_path, shape):
    with pytest.raises(ValueError, match="at least one image"):
        export_file(small(), tmp_path / "net.bsr.safetensors", torch.zeros(shape))


def test_preprocessing_fields_are_checked(tmp_path):
    with pytest.raises(ValueError, match="exactly the fields"):
        export_file(small(), tmp_path / "x", images(1, 3, 8, 8), preprocessing={"mean": [0.5]})


def test_tolerance_grows_with_the_longest_path(tmp_path):
    report = export_file(small(), tmp_path / "net.bsr.safetensors", images(1, 3, 8, 8))
    # Two convolutions of 3*9 and 16*9, the mean of 4x4 pixels, 16 features; eps is 2**-23. Winograd
    # may err three times as much, which is nine times in quadrature.
    expected = 4 * 2**-23 * 5.0 * np.sqrt(9 * (27 + 144) + 16 + 16)
    assert tolerance(read(report.path), 5.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kernel", "stride", "error"),
    [
        ((3, 3), 1, 3), ((1, 3), 1, 1.4), ((3, 1), 1, 1.4), ((1, 7), 1, 2.1), ((5, 5), 1, 2.1),
        ((7, 3), 1, 2.1), ((3, 3), 2, 1), ((1, 1), 1, 1), ((2, 2), 1, 1),
    ],
)  # fmt: skip
def test_tolerance_knows_what_may_run_through_winograd(tmp_path, kernel, stride, error):
    model = nn.Sequential(nn.Conv2d(3, 4, kernel, stride), nn.Flatten())
    report = export_file(model.eval(), tmp_path / "net.bsr.safetensors", images(1, 3, 9, 9))
    expected = 4 * 2**-23 * 5.0 * np.sqrt(round(error**2 * 3 * kernel[0] * kernel[1]))
    assert tolerance(read(report.path), 5.0) == pytest.approx(expected)

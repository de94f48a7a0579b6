"""Every operation that is supported gives PyTorch's logits; every other one is a clear error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_networks import exported, ops, randomized
from torch import nn

from blocksparse.export import CaptureError, UnsupportedOpError, WeightError, export_model
from blocksparse.runtime import load
from blocksparse.runtime.tolerance import tolerance


class Branches(nn.Module):
    """Functions side by side, each behind a convolution of its own; their results concatenated."""

    def __init__(self, functions, channels: int = 8) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(3, channels, 3, padding=1) for _ in functions)
        self.functions = functions
        self.modules_of_functions = nn.ModuleList(f for f in functions if isinstance(f, nn.Module))

    def results(self, x):
        return [f(stem(x)).flatten(1) for f, stem in zip(self.functions, self.stems, strict=True)]

    def forward(self, x):
        return torch.cat(self.results(x), 1)


CONVOLUTIONS = {
    "strided": nn.Conv2d(8, 5, 3, stride=2, padding=1),
    "rectangular": nn.Conv2d(8, 5, (1, 7), stride=(1, 2), padding=(0, 3), bias=False),
    "dilated": nn.Conv2d(8, 5, 3, dilation=2, padding=2),
    "grouped": nn.Conv2d(8, 6, 3, groups=2),
    "depthwise": nn.Conv2d(8, 8, 3, groups=8),
    "same": nn.Conv2d(8, 5, 3, padding="same"),
    "same, uneven": nn.Conv2d(8, 5, 4, padding="same"),
}

POOLS = {
    "max": nn.MaxPool2d(2),
    "max, ceil": nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    "max, dilated": nn.MaxPool2d((2, 3), stride=1, dilation=2),
    "average": nn.AvgPool2d(3, stride=2, padding=1),
    "average, ceil": nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False),
    "average, padding left out": nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
    "adaptive": nn.AdaptiveAvgPool2d((3, 2)),
    "adaptive, to one": nn.AdaptiveAvgPool2d(1),
    "mean": lambda x: x.mean((-2, -1), keepdim=True),
}

ACTIVATIONS = {
    "relu": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "clamp": lambda x: x.clamp(0, 6),
    "clamp from below": lambda x: x.clamp(min=0),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": nn.Hardsigmoid(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(inplace=True),
    "silu by hand": lambda x: x * x.sigmoid(),
    "hardswish by hand": lambda x: x * F.relu6(x + 3) / 6,
}

ARITHMETIC = {
    "scalars": lambda x: (1 - x * 2) / 4 - 0.5 + (-x),
    "per channel": lambda x: (x - torch.arange(8.0).reshape(8, 1, 1)) / torch.full((1, 1, 1), 2.0),
    "scaled sum": lambda x: torch.add(x, F.relu(x), alpha=2) - F.relu(x),
    "gate": lambda x: torch.sigmoid(F.adaptive_avg_pool2d(x, 1)) * x,
    "gate, second": lambda x: F.relu(x) * x.mean((2, 3), keepdim=True),
    "product": lambda x: x * F.relu(x),
    "twice the same": lambda x: x + x,
    "dropout": lambda x: F.dropout(x, training=False),
}

SHAPES = {
    "concat": lambda x: torch.cat([x[:, :3], F.relu(x)[:, 3:]], 1),
    "parts": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "stride 2 and new channels": lambda x: F.pad(x[:, 2:6, ::2, ::2], (0, 0, 0, 0, 1, 3)),
    "slice of a slice": lambda x: x[:, :, 1:][:, :, ::3, :-2][:, :, :, 2:],
    "zero border": lambda x: F.pad(x, (1, 2, 0, 3)),
    "one channel": lambda x: torch.cat([x[:, i].unsqueeze(1) for i in range(7, -1, -1)], 1),
    "channel shuffle": lambda x: (
        x.view(-1, 4, 2, *x.shape[2:]).transpose(1, 2).contiguous().view(-1, 8, *x.shape[2:])
    ),
    "nothing": lambda x: F.avg_pool2d(F.pad(x[:, :, 0:], (0, 0)), 1).reshape(x.shape),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "family",
    [CONVOLUTIONS, POOLS, ACTIVATIONS, ARITHMETIC, SHAPES],
    ids=["convolutions", "pools", "activations", "arithmetic", "shapes"],
)
def test_supported_operations(family):
    model = randomized(Branches(list(family.values())))
    result = export_model(model, (3, 10, 12))
    network = load(result, engine="reference")
    images = torch.randn(3, 3, 10, 12, generator=torch.Generator().manual_seed(0))
    for batch in (images, images[:1]):
        with torch.no_grad():
            expected = model.results(batch)
        ends = np.cumsum([part.shape[1] for part in expected])[:-1]
        found = np.split(network(batch.numpy()), ends, axis=1)
        for name, one, other in zip(family, expected, found, strict=True):
            scale = float(one.abs().max())
            assert np.abs(one.numpy() - other).max() <= tolerance(result, scale), name


HEADS = {
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(-1, 8 * 5 * 5),
    "pooled and squeezed": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
    "mean": lambda x: x.mean([2, 3]),
    "two parts": lambda x: torch.cat([x.mean((2, 3)), x.flatten(1)], 1),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_heads_with_linear_layers(head):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            width = head(torch.zeros(1, 8, 5, 5)).shape[1]
            self.fc1 = nn.Linear(width, 12)
            self.norm = nn.BatchNorm1d(12)
            self.fc2 = nn.Linear(12, 4, bias=False)

        def forward(self, x):
            return self.fc2(F.relu(self.norm(self.fc1(head(self.conv(x))))))

    assert ops(exported(randomized(Net()), (3, 7, 7))).count("linear") == 2


def test_computed_weights_are_folded():
    """Weight norm, and a mask that multiplies the weight, leave plain weights in the file."""

    class Masked(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight * (self.weight > 0), self.bias)

    norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 1))
    model = randomized(nn.Sequential(Masked(3, 8, 3), norm, nn.Flatten()))
    result = exported(model, (3, 5, 5))
    assert ops(result) == ["conv2d", "conv2d", "flatten"]
    assert (result.weights["0"].to_dense() >= 0).all()


def test_names_are_module_paths():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1))
            self.act = nn.Sigmoid()

        def forward(self, x):
            x = self.body(x)
            return self.act(self.act(F.max_pool2d(x, 2)) + 1).flatten(1)

    names = [node.name for node in exported(Net().eval(), (3, 10, 10)).graph.nodes]
    assert names == ["body.0", "body.1", "body.2", "max_pool2d", "act", "affine", "flatten"]


UNSUPPORTED = {
    "gelu": (nn.GELU(), "aten.gelu.default", "no such operation"),
    "leaky": (nn.LeakyReLU(), "aten.leaky_relu.default", "no such operation"),
    "clamp": (lambda x: x.clamp(-1, 1), "aten.clamp.default", r"clamps to \[-1, 1\]"),
    "transposed": (
        nn.ConvTranspose2d(8, 8, 2),
        "aten.convolution.default",
        "transposed convolution",
    ),
    "border": (lambda x: F.pad(x, (1, 1), value=2.0), "constant_pad_nd", "pads with 2"),
    "indices": (
        lambda x: F.max_pool2d(x, 2, return_indices=True)[1].float(),
        "max_pool2d_with_indices",
        "result number 1",
    ),
    "divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "avg_pool2d", "divisor"),
    "half a mean": (lambda x: x.mean(2, keepdim=True), "aten.mean.dim", "height and width"),
    "concat below": (lambda x: torch.cat([x, x], 2), "aten.cat.default", "along channels"),
    "turned": (lambda x: x.transpose(2, 3), "permute", "reorders dimensions"),
    "broadcast sum": (lambda x: x + x.mean((2, 3), keepdim=True), "add.Tensor", "same shape"),
    "map of constants": (lambda x: x + torch.ones(10, 12), "add.Tensor", "more than the channels"),
    "computed divisor": (lambda x: x / F.relu(x), "aten.div.Tensor", "computed value"),
    "floor of a quotient": (
        lambda x: torch.div(x, 2.0, rounding_mode="floor"),
        "aten.div.Tensor_mode",
        "rounds the quotient: rounding_mode='floor'",
    ),
    "whole part of a quotient": (
        lambda x: torch.div(x, torch.full((8, 1, 1), 3.0), rounding_mode="trunc"),
        "aten.div.Tensor_mode",
        "rounds the quotient: rounding_mode='trunc'",
    ),
    "double": (lambda x: (x.double() * 2).float(), "_to_copy", "float64"),
    "statistics of the batch": (
        nn.BatchNorm2d(8, track_running_stats=False),
        "batch_norm",
        "no such operation",
    ),
}


@pytest.mark.parametrize(("function", "op", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_operations_are_named(function, op, reason):
    model = nn.Sequential(Branches([function])).eval()
    with pytest.raises(UnsupportedOpError, match=reason) as caught:
        export_model(model, (3, 10, 12))
    assert op in caught.value.op
    assert caught.value.module.startswith("0")
    assert f"module '{caught.value.module}'" in str(caught.value)


def test_unsupported_operation_says_where_and_what_to_do():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ModuleDict({"act": nn.GELU()})["act"])
    with pytest.raises(UnsupportedOpError) as caught:
        export_model(nn.ModuleDict({"x": model})["x"], (3, 4, 4))
    assert caught.value.module == "1"
    assert "activation.py:" in str(caught.value)
    assert "Replace it by an operation the file has" in str(caught.value)


def test_unfinished_reshape_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2), nn.ReLU())
    with pytest.raises(UnsupportedOpError, match=r"shape \(batch, 8, 16\), reshaped from"):
        export_model(model, (3, 4, 4))


@pytest.mark.parametrize(
    ("part", "value"),
    [("weight", float("nan")), ("running_var", float("-inf")), ("bias", float("inf"))],
)
def test_nan_and_infinity_are_named(part, value):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    getattr(model[1], part).data[2] = value
    with pytest.raises(WeightError, match=rf"1\.{part} of shape \(4,\) holds 1 NaN or infinite"):
        export_model(model, (3, 4, 4))


def test_two_outputs_are_refused():
    class Two(nn.Module):
        def forward(self, x):
            return x + 1, x + 2

    with pytest.raises(CaptureError, match="returns 2 results"):
        export_model(Two(), (3, 4, 4))

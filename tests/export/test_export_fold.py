"""Batch norm disappears into the layer before it, exactly, and only where that is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from export_networks import exported, ops, prune_blocks, randomized
from torch import nn

from blocksparse.export import WeightError, export_model


def test_folding_is_done_in_float64():
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten()))
    result = export_model(model, (3, 5, 5))
    conv, norm = model[0].double(), model[1].double()
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    weight = (conv.weight * scale[:, None, None, None]).detach().numpy()
    bias = ((conv.bias - norm.running_mean) * scale + norm.bias).detach().numpy()
    # Rounded once: half a unit in the last place.
    np.testing.assert_allclose(result.weights["0"].to_dense(), weight, rtol=2**-24 * 1.001)
    np.testing.assert_allclose(result.vectors["0.bias"], bias, rtol=2**-24 * 1.001)
    assert ops(result) == ["conv2d", "flatten"]


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_with_and_without_parameters(affine):
    norm = nn.BatchNorm2d(8, affine=affine, eps=1e-3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, nn.ReLU(), nn.Flatten())
    result = exported(randomized(model), (3, 5, 5))
    assert ops(result) == ["conv2d", "flatten"]
    assert set(result.vectors) == {"0.bias"}


def test_zeros_stay_zeros():
    model = randomized(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Flatten()))
    prune_blocks(model, 0.5)
    model[1].weight.data[3] = -0.7
    model[0].weight.data[3, :, 0, 0] = 0  # within blocks that are kept, too
    dense = exported(model, (16, 5, 5)).weights["0"].to_dense()
    np.testing.assert_array_equal(dense == 0, model[0].weight.detach().numpy() == 0)
    assert not np.signbit(dense[dense == 0]).any()


def test_a_layer_read_twice_keeps_its_values():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.conv(x)
            return (self.norm(x) + x).flatten(1)

    assert ops(exported(randomized(Shared()), (3, 5, 5))).count("affine") == 1


def test_a_module_called_twice_is_folded_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.second(self.conv(self.first(self.conv(x)))).flatten(1)

    result = exported(randomized(Twice()), (4, 3, 3))
    assert ops(result) == ["conv2d", "conv2d", "flatten"]
    assert [node.name for node in result.graph.nodes] == ["conv", "conv_1", "flatten"]


def test_batch_norm_before_a_convolution_stays():
    model = randomized(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1)))
    result = exported(nn.Sequential(model, nn.Flatten()).eval(), (3, 5, 5))
    assert ops(result) == ["affine", "conv2d", "flatten"]
    assert result.graph.nodes[0].attrs["activation"] == "relu"


def test_scales_and_shifts_in_a_row_become_one():
    class Normalize(nn.Module):
        def forward(self, x):
            return ((x / 255 - 0.45) / 0.22 * 1).flatten(1)

    result = exported(Normalize(), (3, 4, 4))
    assert ops(result) == ["affine", "flatten"]
    np.testing.assert_allclose(next(iter(result.vectors.values())), 1 / (255 * 0.22), rtol=1e-7)


@pytest.mark.parametrize("huge", ["weight", "shift"])
def test_values_beyond_float32_are_named(huge):
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten()))
    model[1].running_var[:] = 0
    if huge == "weight":
        model[0].weight.data[:] = 1e37
    else:
        model[1].running_mean[:] = 1e37
    with pytest.raises(WeightError, match=r"^0\.(weight|bias): folding .* beyond float32"):
        export_model(model, (3, 4, 4))

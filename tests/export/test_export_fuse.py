"""Fewer nodes, the same logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from export_networks import exported, ops, randomized
from torch import nn


class Block(nn.Module):
    """Two convolutions and what `join` makes of their results and the input."""

    def __init__(self, join) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.join = join

    def forward(self, x):
        first, second = self.norm1(self.conv1(x)), self.norm2(self.conv2(x))
        return self.join(x, first, second).flatten(1)


FUSED = {
    "identity": (lambda x, a, b: F.relu(a + x), 1),
    "identity first": (lambda x, a, b: F.relu6(x + b), 1),
    "two branches": (lambda x, a, b: F.relu(a + b), 1),
    "later branch first": (lambda x, a, b: F.silu(b + a), 1),
    "no activation": (lambda x, a, b: a + b, 1),
    "chain": (lambda x, a, b: F.relu(F.relu(a + x) + b), 2),
}


class Blocks(nn.Module):
    """Blocks side by side."""

    def __init__(self, joins) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(join) for join in joins)

    def forward(self, x):
        return torch.cat([block(x) for block in self.blocks], 1)


def in_block(result, index):
    """Nodes that came from one of the blocks."""
    return [node for node in result.graph.nodes if node.name.startswith(f"blocks.{index}.")]


def test_residual_adds_are_fused():
    result = exported(randomized(Blocks([join for join, _ in FUSED.values()])), (4, 5, 5))
    for index, (name, (_, count)) in enumerate(FUSED.items()):
        nodes = in_block(result, index)
        assert {node.op for node in nodes} == {"conv2d"}, name
        assert sum(len(node.inputs) == 2 for node in nodes) == count, name


def test_fused_block_is_two_nodes():
    result = exported(randomized(Block(FUSED["two branches"][0])), (4, 5, 5))
    assert [(n.name, n.inputs, n.attrs.get("activation")) for n in result.graph.nodes] == [
        ("conv1", ("input",), "none"),
        ("conv2", ("input", "conv1"), "relu"),
        ("flatten", ("conv2",), None),
    ]


def test_a_convolution_moves_behind_what_it_adds():
    """The other operand may be computed after the convolution that takes it in."""
    model = Block(lambda x, a, b: a + F.max_pool2d(x, 3, 1, 1))
    result = exported(randomized(model), (4, 5, 5))
    assert [node.name for node in result.graph.nodes] == ["max_pool2d", "conv1", "flatten"]


UNFUSED = {
    "activation before the add": lambda x, a, b: F.relu(a) + F.relu(b),
    "read twice": lambda x, a, b: (a + x) * a,
    "other activation after": lambda x, a, b: torch.sigmoid(F.relu(x) + F.relu(a)),
    "added to itself": lambda x, a, b: a + a,
}


def test_adds_that_must_not_be_fused():
    result = exported(randomized(Blocks(UNFUSED.values())), (4, 5, 5))
    for index, name in enumerate(UNFUSED):
        nodes = in_block(result, index)
        assert [node.op for node in nodes].count("add") == 1, name
        assert all(len(node.inputs) == 1 for node in nodes if node.op == "conv2d"), name


def test_activations_are_fused_once():
    model = Block(lambda x, a, b: torch.sigmoid(F.relu(a)))
    result = exported(randomized(model), (4, 5, 5))
    assert ops(result) == ["conv2d", "activation", "flatten"]
    assert result.graph.nodes[0].attrs["activation"] == "relu"


def test_unread_results_are_dropped():
    assert ops(exported(randomized(Block(lambda x, a, b: b)), (4, 5, 5))) == ["conv2d", "flatten"]


def test_an_activation_of_a_shared_value_stays_apart():
    model = Block(lambda x, a, b: torch.cat([a, F.relu(a)], 1))
    assert ops(exported(randomized(model), (4, 5, 5))) == [
        "conv2d",
        "activation",
        "concat",
        "flatten",
    ]


def test_slices_are_merged():
    model = Block(lambda x, a, b: x[:, 1:, ::2][:, :, 1:, 1::2][:, :2])
    result = exported(randomized(model), (4, 7, 9))
    assert ops(result) == ["slice", "flatten"]
    assert dict(result.graph.nodes[0].attrs) == {
        "start": (1, 2, 1),
        "stop": (3, 7, 8),
        "step": (1, 2, 2),
    }


def test_what_does_nothing_is_removed():
    model = Block(
        lambda x, a, b: F.adaptive_avg_pool2d(F.avg_pool2d(F.pad(x[:, :4] * 1, (0, 0)), 1), (5, 5))
    )
    assert ops(exported(randomized(model), (4, 5, 5))) == ["flatten"]


def test_the_last_node_takes_an_activation_in():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 5)

        def forward(self, x):
            x = self.fc(x.flatten(1))
            return x * torch.sigmoid(x)

    result = exported(randomized(Gated()), (3, 2, 2))
    assert ops(result) == ["flatten", "linear"]
    assert result.graph.nodes[-1].attrs["activation"] == "silu"


class PoolThenConv(nn.Module):
    """An average pool and a 1x1 convolution after it, as in Inception's pool branches."""

    def __init__(self, outputs=4, include_pad=True, kernel=1, norm=True) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, padding=1, count_include_pad=include_pad)
        self.conv = nn.Conv2d(8, outputs, kernel, padding=kernel // 2, bias=not norm)
        self.norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()

    def forward(self, x):
        return torch.cat([F.relu(self.norm(self.conv(self.pool(x)))), x], 1).flatten(1)


@pytest.mark.parametrize("include_pad", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_a_convolution_to_fewer_channels_goes_before_its_average_pool(include_pad, norm):
    # `exported` compares the outputs with PyTorch's
    result = exported(randomized(PoolThenConv(include_pad=include_pad, norm=norm)), (8, 5, 6))
    assert ops(result)[:3] == ["conv2d", "avg_pool2d", "affine"]
    conv, pool, affine = result.graph.nodes[:3]
    assert conv.attrs["activation"] == "none"
    assert affine.attrs["activation"] == "relu"
    assert pool.shape[0] == 4
    assert set(result.weights) == {"conv"}, "the layer keeps its name"


@pytest.mark.parametrize("change", [{"outputs": 5}, {"kernel": 3}], ids=str)
def test_convolutions_that_gain_nothing_stay_behind_their_pool(change):
    result = exported(randomized(PoolThenConv(**change)), (8, 6, 6))
    assert ops(result)[:2] == ["avg_pool2d", "conv2d"]


def test_a_convolution_stays_behind_a_pool_with_a_stride():
    net = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 4, 1), nn.Flatten())
    assert ops(exported(randomized(net), (8, 6, 6)))[:2] == ["avg_pool2d", "conv2d"]

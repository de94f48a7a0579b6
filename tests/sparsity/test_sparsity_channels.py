"""Channels that may change places: the same function on every architecture, and no more freedom."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from blocksparse.sparsity import Channels, find_channels, reorder
from blocksparse.training import ResNetCifar, build_model

EPS = torch.finfo(torch.float64).eps


def randomized(network: nn.Module) -> nn.Module:
    """No two channels alike: statistics, scales and shifts differ, too. In float64, evaluating."""
    generator = torch.Generator().manual_seed(0)
    network = network.double()
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if (value.is_floating_point() and value.ndim <= 1) or "layer_scale" in name:
            value.data.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def shuffled(network: nn.Module, channels: Channels, seed: int = 0) -> nn.Module:
    rng = np.random.default_rng(seed)
    network = copy.deepcopy(network)
    for group in channels.groups:
        reorder(network, group, rng.permutation(group.size))
    return network


def assert_same_function(network: nn.Module, other: nn.Module, shape: tuple[int, ...]) -> None:
    """Logits in float64 agree to rounding.

    Only the order of sums differs. A sum of n terms is off by n * eps of the sum of magnitudes;
    n stays below 2^15 here, and each of at most 2^8 layers in a row may add its own.
    """
    images = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = network(images), other(images)
    if isinstance(expected, torch.Tensor):
        expected, found = [expected], [found]
    for one, two in zip(expected, found, strict=True):
        assert one.std() > 0
        assert float((one - two).abs().max()) <= 2**15 * 2**8 * EPS * float(one.abs().max())


def check(network: nn.Module, shape: tuple[int, ...]) -> Channels:
    network = randomized(network)
    channels = find_channels(network, shape)
    other = shuffled(network, channels)
    assert channels.groups
    for group in channels.groups:
        for place in group.places:
            weight = network.state_dict()[place.name]
            assert place.positions.shape[0] == group.size >= 2
            assert place.positions.max() < weight.shape[place.axis]
            assert len(np.unique(place.positions)) == place.positions.size
    assert_same_function(network, other, shape)
    moved = {place.name for group in channels.groups for place in group.places}
    for (name, one), two in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two) == (name not in moved), name
    return channels


def test_cifar_resnet_all_but_image_and_logits():
    channels = check(ResNetCifar(1, widths=(4, 8, 12)), (3, 8, 8))
    axes = {(place.name, place.axis) for group in channels.groups for place in group.places}
    convolutions = [f"layer{stage}.0.conv{i}.weight" for stage in (1, 2, 3) for i in (1, 2)]
    expected = {(name, axis) for name in convolutions for axis in (0, 1)}
    expected |= {("conv1.weight", 0), ("linear.weight", 1)}
    assert expected <= axes
    assert ("conv1.weight", 1) not in axes
    assert ("linear.weight", 0) not in axes
    assert not channels.fixed


def test_option_a_pads_split_the_stages():
    # Channels 2-5 of the second stage continue the first one, between two zeros on each side; of
    # the third's 12, 2-9 continue the second's.
    channels = find_channels(ResNetCifar(1, widths=(4, 8, 12)), (3, 8, 8))
    streams = {
        tuple(place.positions[:, 0].tolist())
        for group in channels.groups
        for place in group.places
        if place.name == "linear.weight"
    }
    assert streams == {(4, 5, 6, 7), (2, 3, 8, 9), (0, 1, 10, 11)}


def test_flatten_moves_all_pixels_of_a_channel():
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 4)
    )
    channels = check(network, (3, 6, 6))
    (places,) = [group.places for group in channels.groups]
    columns = {place.name: place.positions for place in places}["4.weight"]
    assert columns.tolist() == np.arange(54).reshape(6, 9).tolist()


class Forked(nn.Module):
    """Concatenates two branches, one of them a sum of both, and a slice; multiplies halves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
        self.grouped = nn.Conv2d(16, 12, 1, groups=2)
        self.left = nn.Conv2d(12, 8, 1)
        self.right = nn.Conv2d(12, 8, 1)
        self.joined = nn.Conv2d(20, 8, 1)
        self.last = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.grouped(F.relu(self.depthwise(F.relu(self.stem(x))))))
        left, right = self.left(x), self.right(x)
        x = torch.cat([left, left + right, left[:, 2:6]], 1)
        x = self.joined(x)
        one, two = x.chunk(2, dim=1)
        return self.last((one * torch.sigmoid(two)).mean((2, 3)))


def test_branches_slices_and_groups():
    channels = check(Forked(), (3, 9, 9))
    sizes = {
        (place.name, place.axis): sorted(
            group.size
            for group in channels.groups
            if any((p.name, p.axis) == (place.name, place.axis) for p in group.places)
        )
        for group in channels.groups
        for place in group.places
    }
    assert ("depthwise.weight", 0) not in sizes  # what a grouped convolution reads
    assert sizes["grouped.weight", 0] == [6, 6]  # within a group
    assert sizes["right.weight", 0] == [4]  # the others are read twice, so they stay
    assert ("joined.weight", 0) not in sizes  # halves of one layer that are multiplied
    assert channels.fixed == {"a convolution of 2 groups reads them": 16}


class Shared(nn.Module):
    """One convolution applied twice, and one that a second name has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.again = nn.Conv2d(6, 6, 1)
        self.alias = self.first
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + 0 * self.alias(x)
        return self.last(F.relu(self.again(F.relu(self.again(x))))).mean((2, 3))


def test_shared_layers_stay_the_same_function():
    check(Shared(), (3, 4, 4))


class Odd(nn.Module):
    """What cannot be followed: channels reversed, sorted, and softmax over them."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 1)] + [nn.Conv2d(6, 6, 1) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convs[0](x)
        x = self.convs[1](x + x.flip(1))
        x = self.convs[2](x.sort(1).values)
        x = self.convs[3](x.softmax(1) * torch.arange(6.0).reshape(6, 1, 1))
        scaled = F.conv2d(F.relu(x), self.convs[4].weight * 2)
        return scaled.mean((2, 3))


def test_what_is_not_followed_stays_and_says_so():
    network = randomized(Odd())
    channels = find_channels(network, (3, 4, 4))
    assert_same_function(network, shuffled(network, channels), (3, 4, 4))
    moved = {place.name for group in channels.groups for place in group.places}
    assert not any(name.endswith("weight") for name in moved)
    assert any("flip" in reason for reason in channels.fixed)
    assert any("sort" in reason for reason in channels.fixed)


def test_a_network_without_channels_has_none():
    assert find_channels(nn.ReLU(), (3, 4, 4)) == Channels((), {})


def test_a_network_that_cannot_be_traced_stays():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x if x.sum() > 0 else -x

    channels = find_channels(Branching(), (3, 4, 4))
    assert channels.groups == ()
    ((reason, count),) = channels.fixed.items()
    assert "could not be traced" in reason
    assert count == 4


def test_the_network_itself_and_the_random_state_stay():
    network = torchvision.models.get_model("squeezenet1_1").train()
    before = copy.deepcopy(network.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    find_channels(network, (3, 64, 64))
    assert torch.equal(torch.rand(3), expected)
    assert network.training
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


ARCHITECTURES = {
    "resnet20": 32,
    "resnet56": 32,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "vgg11": 64,
    "vgg16_bn": 64,
    "inception_v3": 299,
    "googlenet": 96,
    "squeezenet1_0": 64,
    "squeezenet1_1": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "shufflenet_v2_x1_0": 64,
    "convnext_tiny": 64,
    "regnet_y_400mf": 64,
    "regnet_x_400mf": 64,
    "mnasnet0_5": 64,
    "alexnet": 96,
    "vit_b_16": 224,
    "swin_t": 64,
}


@pytest.mark.long
@pytest.mark.parametrize(("name", "size"), ARCHITECTURES.items())
def test_same_function_on_every_architecture(name, size):
    check(build_model(name, num_classes=10, input_shape=(3, size, size)), (3, size, size))


@pytest.mark.long
@pytest.mark.parametrize(("name", "size"), [("inception_v3", 299), ("googlenet", 96)])
def test_auxiliary_classifiers_stay_the_same_function(name, size):
    network = randomized(build_model(name, num_classes=10, input_shape=(3, size, size)))
    other = shuffled(network, find_channels(network, (3, size, size)))
    for one in (network, other):
        one.train()
        for module in one.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    assert_same_function(network, other, (3, size, size))

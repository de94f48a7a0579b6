"""Permutations: what the search weighs, that it never loses, and that it finds what was hidden."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blocksparse.sparsity import (
    NM,
    Block,
    Floors,
    Global,
    Layers,
    Unstructured,
    VectorNM,
    find_channels,
    l1,
    layer_mask,
    permute,
    plan_masks,
    reorder,
    resolve,
)
from blocksparse.sparsity.permutation import exchange
from blocksparse.sparsity.placement import Layer, best_mates
from blocksparse.training import ResNetCifar

EPS = float(np.finfo(np.float32).eps)
ALL = Layers(first_conv_dense=False, classifier_dense=False)


def chain(seed: int = 0, width: int = 32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    ).eval()


def kept(network: nn.Module, plan) -> float:
    """By definition: the share of squares under the plan's masks, on average over the layers."""
    weights = {name: weight.detach().double() for name, weight in plan.weights(network).items()}
    masks = plan_masks(plan, weights, 1.0)
    shares = [
        float(weight[masks[name]].square().sum() / weight.square().sum())
        for name, weight in weights.items()
    ]
    return sum(shares) / len(shares)


# -- what the search weighs ------------------------------------------------------------------------

patterns = st.sampled_from(
    [Block(2, 3), Block(3, 2, shared=False), Block(4, 1), NM(2, 4), NM(1, 3), VectorNM(2, 1, 3)]
)


@st.composite
def layers(draw):
    outs, ins, taps = (draw(st.integers(*ends)) for ends in ((2, 11), (2, 11), (1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    energy = rng.standard_normal((outs, ins, taps)).astype(np.float32) ** 2
    pattern = draw(patterns)
    most = int(pattern.sizes((outs, ins, taps)).sum())
    share = 1.0 if isinstance(pattern, VectorNM) else draw(st.sampled_from([0.0, 0.3, 0.5, 0.8]))
    return Layer(energy, pattern, int(share * most))


@settings(max_examples=80, deadline=None)
@given(layers())
def test_kept_is_what_the_mask_keeps(layer):
    _outs, _ins, _ = layer.energy.shape
    weight = torch.from_numpy(np.sqrt(layer.energy))
    sparsity = layer.zeros / weight.numel()
    if isinstance(layer.pattern, VectorNM):
        sparsity = layer.pattern.limit
    mask = layer_mask(weight, layer.pattern, sparsity)
    expected = float(weight.double()[mask].square().sum() / weight.double().square().sum())
    assert layer.kept() == pytest.approx(expected, abs=layer.energy.size * EPS)


@settings(max_examples=80, deadline=None)
@given(layers(), st.sampled_from([0, 1]), st.integers(0, 2**16))
def test_gain_of_an_exchange_is_what_it_changes(layer, axis, seed):
    """The slow twin: exchange two strands, and sum up what every block or group then keeps."""
    size = layer.energy.shape[axis]
    places = np.random.default_rng(seed).permutation(size)[: max(2, size // 2)]
    term = layer.term(axis, places, 10**6)
    if term is None or (isinstance(layer.pattern, VectorNM) and axis == 0):
        return  # nothing to say, or a lower bound: see below
    worth = np.zeros((len(places), len(places)), dtype=np.float32)
    term.add_worth(np.arange(len(places)), worth)
    bound = naive_bound(layer)
    before = naive_kept(layer, bound)
    for one in range(len(places)):
        for other in range(one):
            if term.bins[one] == term.bins[other]:
                continue
            swapped = copy.copy(layer)
            swapped.reorder(axis, places[[one, other]], np.array([1, 0]))
            gain = worth[one, other] + worth[other, one] - worth[one, one] - worth[other, other]
            expected = naive_kept(swapped, bound) - before
            assert gain == pytest.approx(expected, abs=8 * layer.energy.size * EPS)


def naive_bound(layer: Layer) -> float:
    """Return the energy for each weight, between the last block that goes and the next."""
    if isinstance(layer.pattern, VectorNM):
        return 0.0
    rates = sorted(energy / size for energy, size in naive_blocks(layer))
    sizes = [size for _, size in sorted((e / s, s) for e, s in naive_blocks(layer))]
    gone = dropped = 0
    while gone < layer.zeros:
        gone += sizes[dropped]
        dropped += 1
    border = rates[max(dropped - 1, 0) : dropped + 1]
    return sum(border) / len(border)


def naive_blocks(layer: Layer) -> list[tuple[float, int]]:
    pattern = layer.pattern
    outs, ins, taps = layer.energy.shape
    positions = [slice(None)] if pattern.shared else [slice(t, t + 1) for t in range(taps)]
    tiles = [
        layer.energy[top : top + pattern.rows, left : left + pattern.cols, where]
        for top in range(0, outs, pattern.rows)
        for left in range(0, ins, pattern.cols)
        for where in positions
    ]
    return [(float(tile.sum(dtype=np.float64)), tile.size) for tile in tiles]


def naive_kept(layer: Layer, bound: float) -> float:
    """Blocks: what exceeds the bound. N:M: the largest of each group."""
    if not isinstance(layer.pattern, VectorNM):
        return sum(max(energy - bound * size, 0.0) for energy, size in naive_blocks(layer))
    pattern, total = layer.pattern, 0.0
    outs, ins, taps = layer.energy.shape
    for top in range(0, outs, pattern.vector):
        for left in range(0, ins, pattern.m):
            for tap in range(taps):
                tile = layer.energy[top : top + pattern.vector, left : left + pattern.m, tap]
                total += float(np.sort(tile.sum(0, dtype=np.float64))[-pattern.n :].sum())
    return total


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**16))
def test_exchanged_rows_of_a_vector_keep_what_was_promised(half, seed):
    rng = np.random.default_rng(seed)
    energy = rng.standard_normal((2 * half, 12, 2)).astype(np.float32) ** 2
    layer = Layer(energy, VectorNM(4, 2, 4), 0)
    places = np.arange(2 * half)
    term = layer.term(0, places, 10**6)
    before = layer.kept()
    layer.reorder(0, places, exchange([term], len(places)))
    assert layer.kept() >= before - energy.size * EPS


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.integers(1, 2), st.integers(0, 2**16))
def test_best_mates_are_the_best(size, cuts, seed):
    rng = np.random.default_rng(seed)
    worth = rng.integers(0, 9, (size, size)).astype(np.float32)
    bins = rng.integers(0, 4, (cuts, size))
    mates, gains = best_mates(worth, bins)
    for place in range(size):
        found = [(0.0, place)]
        for mate in range(size):
            if not (bins[:, place] == bins[:, mate]).any():
                gain = worth[place, mate] + worth[mate, place]
                found.append((gain - worth[place, place] - worth[mate, mate], mate))
        assert gains[place] == max(gain for gain, _ in found)
        assert (gains[place], mates[place]) in found


# -- what comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "target"),
    [
        (Block(8, 8), 0.5),
        (Block(8, 8, shared=False), 0.75),
        (Block(3, 5), 0.6),
        (NM(2, 4), 0.5),
        (NM(1, 4), 0.3),
        (VectorNM(8, 2, 4), 0.5),
        (Unstructured(), 0.5),
    ],
    ids=str,
)
def test_keeps_more_and_computes_the_same(pattern, target):
    network = chain().double()
    before = copy.deepcopy(network)
    plan = resolve(network, target=target, pattern=pattern, layers=ALL)
    expected = kept(network, plan)
    report = permute(network, plan, (3, 8, 8))
    assert report.before == pytest.approx(expected, abs=1e-9)
    assert report.after == pytest.approx(kept(network, plan), abs=1e-9)
    assert report.after >= report.before
    if not isinstance(pattern, Unstructured) and target != 0.3:
        assert report.after > report.before + 0.003
        assert 0 < report.moved <= report.channels == 96
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    # Sums of at most 9 * 32 products, four in a row, in another order.
    bound = 4 * 9 * 32 * torch.finfo(torch.float64).eps
    expected_logits = before(images).detach()
    scale = float(expected_logits.abs().max())
    assert float((network(images) - expected_logits).abs().max()) <= 32 * bound * scale


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("allocation", [None, Global()], ids=["uniform", "global"])
def test_never_worse_and_always_the_same(seed, allocation):
    torch.manual_seed(seed)
    network = ResNetCifar(1, widths=(8, 16, 24)).eval()
    plan = resolve(network, target=0.4, score=l1, allocation=allocation)
    twin = copy.deepcopy(network)
    report = permute(network, plan, (3, 16, 16))
    again = permute(twin, plan, (3, 16, 16))
    assert report.after >= report.before
    assert [layer.after for layer in again.layers] == [layer.after for layer in report.layers]
    for name, value in network.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_what_cannot_be_bettered_stays():
    network = chain()
    plan = resolve(network, target=0.5, layers=ALL, floors=Floors(0.0, False))
    with torch.no_grad():
        for name, weight in plan.weights(network).items():
            weight *= plan_masks(plan, {**plan.weights(network)}, 1.0)[name]
    before = copy.deepcopy(network.state_dict())
    report = permute(network, plan, (3, 8, 8))
    assert report.before == report.after == 1.0
    assert report.moved == 0
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "pattern", [Block(8, 8), Block(8, 8, shared=False), VectorNM(8, 2, 4), NM(2, 4)], ids=str
)
def test_finds_a_hidden_structure(pattern):
    network = chain(width=64)
    inner = Layers(include=["2", "5"], first_conv_dense=False, classifier_dense=False)
    plan = resolve(network, target=0.5, pattern=pattern, layers=inner)
    with torch.no_grad():
        masks = plan_masks(plan, plan.weights(network), 1.0)
        for name, weight in plan.weights(network).items():
            weight *= torch.where(masks[name], 1.0, 0.05)
    planted = kept(network, plan)
    rng = np.random.default_rng(0)
    for group in find_channels(network, (3, 8, 8)).groups:
        reorder(network, group, rng.permutation(group.size))
    report = permute(network, plan, (3, 8, 8), passes=4)
    assert planted > 0.99
    assert report.before < 0.9
    assert report.after > report.before + 0.7 * (planted - report.before)


def test_report_is_written_down(tmp_path):
    network = chain()
    plan = resolve(network, target=0.5)
    report = permute(network, plan, (3, 8, 8))
    as_json, as_text = report.save(tmp_path)
    entry = json.loads(as_json.read_text())
    assert entry["after"] == report.after
    assert [layer["name"] for layer in entry["layers"]] == ["2", "5"]
    assert as_text.read_text() == report.to_markdown()
    assert f"{report.layers[0].after:.4f}" in as_text.read_text()
    assert report.table().row_count == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [as_json.name, as_text.name]


def test_refuses_no_passes():
    network = chain()
    with pytest.raises(ValueError, match="passes is 0"):
        permute(network, resolve(network, target=0.5), (3, 8, 8), passes=0)

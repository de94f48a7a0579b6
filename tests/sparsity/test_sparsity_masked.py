"""Masked weights: exact zeros, plain modules, ramps that only drop, and what falls short."""

from __future__ import annotations

import copy
import math

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
    MaskedWeights,
    Uniform,
    Unstructured,
    VectorNM,
    resolve,
)


def network(seed: int = 0) -> nn.Module:
    """Ragged edges everywhere."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 30, 3), nn.Conv2d(30, 21, 3), nn.Conv2d(21, 44, (1, 3)), nn.Linear(44, 5)
    )


patterns = st.sampled_from(
    [
        Block(8, 8),
        Block(8, 8, shared=False),
        Block(4, 2),
        NM(2, 4),
        VectorNM(8, 1, 4),
        Unstructured(),
    ]
)


@given(patterns, st.sampled_from([Uniform(), Global()]), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_ramp_only_ever_drops_and_ends_at_the_target(pattern, allocation, seed):
    model = network(seed)
    target = 0.7 * pattern.limit
    floors = Floors(0.02, keep_channels=pattern != Block(8, 8))
    plan = resolve(model, target=target, pattern=pattern, allocation=allocation, floors=floors)
    masked = MaskedWeights(plan)
    before = {layer.param: torch.ones(layer.shape, dtype=torch.bool) for layer in plan.pruned}
    for share in (0.0, 0.3, 0.31, 0.7, 0.95, 1.0):
        masked.adopt(masked.build(model, share))
        masked.impose(model)
        for param, mask in masked.masks.items():
            assert not (mask & ~before[param]).any()
        before = masked.masks
        with torch.no_grad():  # training goes on: what is left changes
            for weight in model.parameters():
                weight.add_(0.01 * torch.randn_like(weight))
            masked.impose(model)
    zeros = masked.count(model)
    masked.check_reached(zeros)
    for layer in plan.pruned:
        assert zeros[layer.param] == int((~before[layer.param]).sum())


def test_no_unit_is_called_back_because_fewer_would_do():
    model = nn.Linear(9, 4)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.weight[0, 8] = 0.1  # a ragged block of one, the least important
        model.weight[3, :4] = 0.5  # a full block of four, the next
    plan = resolve(
        model,
        target=4 / 36,
        pattern=Block(1, 4),
        floors=Floors(0.0, keep_channels=False),
        layers=Layers(classifier_dense=False),
    )
    masked = MaskedWeights(plan)
    for share in (0.9, 1.0):  # both ask for 4 zeros; now that all 5 are zero, 4 are to be had
        masked.adopt(masked.build(model, share))
        masked.impose(model)
        mask = masked.masks["weight"]
        assert not mask[0, 8]
        assert not mask[3, :4].any()
        assert int((~mask).sum()) == 5


def test_imposing_gives_plain_zeros_whatever_was_there():
    model = network()
    masked = MaskedWeights(resolve(model, target=0.5, pattern=Block(4, 4)))
    masked.adopt(masked.build(model, 1.0))
    mask = masked.masks["1.weight"]
    with torch.no_grad():
        model[1].weight[~mask] = math.nan
        model[1].weight[~mask][::2] = -1.0
    masked.impose(model)
    gone = model[1].weight[~mask]
    assert (gone == 0).all()
    assert not torch.signbit(gone).any()
    assert (model[1].weight[mask] != 0).all()


def test_the_network_stays_a_plain_one():
    model = network()
    keys = list(model.state_dict())
    masked = MaskedWeights(resolve(model, target=0.5, pattern=Block(4, 4)))
    masked.adopt(masked.build(model, 1.0))
    masked.impose(model)
    assert list(model.state_dict()) == keys
    assert all(param.is_leaf for param in model.parameters())
    twin = copy.deepcopy(model)
    assert torch.equal(twin[1].weight, model[1].weight)
    assert masked.count(twin) == masked.count(model)


def test_channels_last_weights_are_masked_in_their_layout():
    model = network().to(memory_format=torch.channels_last)
    plain = network()
    for each in (model, plain):
        masked = MaskedWeights(resolve(each, target=0.5, pattern=Block(4, 4, shared=False)))
        masked.adopt(masked.build(each, 1.0))
        masked.impose(each)
    assert torch.equal(model[1].weight, plain[1].weight)
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)


def test_what_falls_short_is_named():
    model = network()
    masked = MaskedWeights(resolve(model, target=0.5, pattern=Block(4, 4)))
    with pytest.raises(RuntimeError, match=r"target is not reached: 0 of .*1 0\.0000 of 0\.5"):
        masked.check_reached(masked.count(model))

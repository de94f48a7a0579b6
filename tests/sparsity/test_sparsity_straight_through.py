"""Straight-through masks: SR-STE by its formula, values that are held, and units that come back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsity_naive import block_mask, nm_mask
from torch import nn

from blocksparse.sparsity import (
    NM,
    Block,
    Cubic,
    Floors,
    Layers,
    OneShot,
    Ramp,
    StraightThrough,
    Unstructured,
    Updates,
    l2,
    movement,
    resolve,
    taylor,
)

LR, MOMENTUM, WEIGHT_DECAY, DECAY = 0.1, 0.9, 1e-2, 0.05


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(6, 10, 2), nn.ReLU(), nn.Conv2d(10, 7, 2), nn.Flatten(), nn.Linear(28, 3)
    )


def plan_of(model, pattern, target=0.5):
    layers = Layers(first_conv_dense=False, classifier_dense=False)
    return resolve(model, target=target, pattern=pattern, floors=Floors(0.0, False), layers=layers)


def batch(step: int):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 6, 4, 4, generator=generator), torch.tensor([0, 1, 2, 0, 1])


def sgd(model):
    return torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)


def train(model, ramp, optimizer, steps, total, trace=None):
    """Plain PyTorch around the ramp, from the first step not yet done."""
    if not ramp.masked.packed:
        ramp.adopt(model, ramp.build(model, 0, total), 0, total)
    for step in steps:
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        ramp.before_step(model, list(model.parameters()))
        optimizer.step()
        ramp.after_step(model)
        if ramp.due(step + 1, total):
            ramp.adopt(model, ramp.build(model, step + 1, total), step + 1, total)
        if trace is not None:
            trace.append((copy.deepcopy(model.state_dict()), ramp.masked.masks))


def naive_mask(weight, pattern, zeros):
    if isinstance(pattern, NM):
        mask = nm_mask(weight.numpy(), 1, pattern.n, pattern.m, zeros)
    else:
        mask = block_mask(weight.numpy(), pattern.rows, pattern.cols, pattern.shared, zeros)
    return torch.from_numpy(mask)


@pytest.mark.parametrize("pattern", [NM(2, 4), Block(4, 4), Block(2, 3, shared=False)])
def test_sr_ste_is_what_the_paper_writes(pattern):
    """W <- W - lr (g(mask W) + decay (1 - mask) W), with momentum and weight decay, every step."""
    model = network()
    plan = plan_of(model, pattern)
    ramp = Ramp(plan, Updates(OneShot(), 1, "straight_through", DECAY, until=1.0))
    dense = {name: value.detach().clone() for name, value in model.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in dense.items()}
    zeros = {layer.param: layer.zeros for layer in plan.pruned}
    trace, steps = [], 4
    train(model, ramp, sgd(model), range(steps), steps + 1, trace)
    masks = {param: naive_mask(dense[param], pattern, zeros[param]) for param in zeros}
    for step in range(steps):
        leaves = {
            name: (value * masks.get(name, 1.0)).requires_grad_() for name, value in dense.items()
        }
        images, labels = batch(step)
        loss = F.cross_entropy(torch.func.functional_call(model, leaves, images), labels)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for name, weight in dense.items():
            grad = grads[name]
            if name in masks:
                grad = grad + DECAY * ~masks[name] * weight
            velocity[name] = MOMENTUM * velocity[name] + grad + WEIGHT_DECAY * weight
            dense[name] = weight - LR * velocity[name]
        masks = {param: naive_mask(dense[param], pattern, zeros[param]) for param in zeros}
        weights, now = trace[step]
        for param, mask in masks.items():
            assert torch.equal(now[param], mask)
            assert (weights[param][~mask] == 0).all()
            torch.testing.assert_close(weights[param], dense[param] * mask)
    for param, mask in masks.items():
        torch.testing.assert_close(ramp.masked.held[param], dense[param][~mask])


patterns = st.sampled_from([Block(4, 4), Block(3, 2, shared=False), NM(1, 4), Unstructured()])


@pytest.mark.slow
@given(patterns, st.sampled_from([l2, taylor, movement]), st.integers(1, 3), st.integers(0, 9))
@settings(max_examples=12, deadline=None)
def test_a_ramp_taken_up_again_goes_on_alike_and_ends_in_exact_zeros(
    pattern, score, interval, seed
):
    model, total = network(seed), 8
    plan = resolve(
        model,
        target=0.6 * pattern.limit,
        pattern=pattern,
        score=score,
        floors=Floors(0.0, False),
        layers=Layers(first_conv_dense=False),
    )
    updates = Updates(Cubic(0.1, 0.6), interval, "straight_through", until=0.9)
    ramp, optimizer = Ramp(plan, updates), sgd(model)
    train(model, ramp, optimizer, range(4), total)
    again = copy.deepcopy(model)
    others = sgd(again)
    others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    taken_up = Ramp(plan, updates, copy.deepcopy(ramp.state()))
    train(model, ramp, optimizer, range(4, total), total)
    train(again, taken_up, others, range(4, total), total)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert ramp.settled
    assert ramp.state()["held"] is None
    ramp.masked.check_reached(ramp.masked.count(model))
    for param, mask in ramp.masked.masks.items():
        assert (model.get_parameter(param)[~mask] == 0).all()
        assert torch.equal(taken_up.masked.masks[param], mask)


def test_what_was_dropped_comes_back_when_it_outgrows_others():
    model = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.weight[0, :4] = 0.5
    plan = plan_of(model, Block(1, 4), 1 / 8)
    masks = {}
    for backward in ("masked", "straight_through"):
        twin = copy.deepcopy(model)
        ramp = Ramp(plan, Updates(OneShot(), 1, backward, 0.0, 1.0 if backward[0] == "s" else None))
        ramp.adopt(twin, ramp.build(twin, 0, 2), 0, 2)
        assert not ramp.masked.masks["weight"][0, :4].any()
        optimizer = torch.optim.SGD(twin.parameters(), 1.0)
        twin.weight.grad = torch.zeros_like(twin.weight)
        twin.weight.grad[0, :4] = -1.0  # grows, by 1
        twin.weight.grad[3, 4:] = 0.25  # shrinks to 0.75
        ramp.before_step(twin, list(twin.parameters()))
        optimizer.step()
        ramp.after_step(twin)
        if ramp.due(1, 2):
            ramp.adopt(twin, ramp.build(twin, 1, 2), 1, 2)
        masks[backward] = ramp.masked.masks["weight"]
        if backward == "straight_through":
            assert (twin.weight[0, :4] == 1.5).all()
            assert (twin.weight[3, 4:] == 0.0).all()
            assert (ramp.masked.held["weight"] == 0.75).all()
    assert not masks["masked"][0, :4].any()
    assert masks["straight_through"][0, :4].all()


def test_imposing_and_restoring_twice_changes_nothing():
    model = network().to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    masked = StraightThrough(plan_of(model, Block(4, 4)))
    masked.adopt(masked.build(model, 1.0))
    for _ in range(2):
        masked.impose(model)
    held = masked.held
    assert all(not masked.masks[param].all() and len(held[param]) for param in held)
    for _ in range(2):
        masked.restore(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    masked.impose(model)
    assert all(torch.equal(masked.held[param], values) for param, values in held.items())
    assert masked.held.keys() == {"0.weight", "2.weight", "4.weight"}


def test_decay_reaches_the_weights_of_one_optimizer_only():
    model = network()
    masked = StraightThrough(plan_of(model, Block(4, 4)))
    masked.adopt(masked.build(model, 1.0))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    masked.add_decay(model, 0.5, [model[0].weight])
    mask = masked.masks["0.weight"]
    assert torch.equal(model[0].weight.grad, 0.5 * model[0].weight.detach() * ~mask)
    assert not model[2].weight.grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interval": 0}, "at least 1"),
        ({"backward": "dense"}, "masked or straight_through"),
        ({"decay": -1.0}, "cannot be negative"),
        ({"until": 0.9}, "set sparsity.backward=straight_through"),
        ({"until": 0.4, "backward": "straight_through"}, r"from the end of the ramp, 0\.5, to 1"),
    ],
)
def test_updates_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Updates(Cubic(0.0, 0.5), **changes)

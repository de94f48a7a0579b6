"""Learning rate and weight decay over time."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from blocksparse.training import Optimization


def test_learning_rate_over_time():
    recipe = Optimization(lr=2.0, warmup=0.2, hold=0.6, final_lr=0.5)
    assert recipe.lr_factor(0.0) == pytest.approx(0.1)
    assert recipe.lr_factor(0.1) == pytest.approx(0.55)
    for time in (0.2, 0.4, 0.6):
        assert recipe.lr_factor(time) == 1.0
    assert recipe.lr_factor(0.8) == pytest.approx((1 + 0.25) / 2)
    assert recipe.lr_factor(0.7) == pytest.approx(0.25 + 0.75 * (1 + math.cos(math.pi / 4)) / 2)
    assert recipe.lr_factor(1.0) == pytest.approx(0.25)
    assert recipe.lr_factor(1.5) == pytest.approx(0.25)


def test_linear_fall_right_after_the_warm_up():
    recipe = Optimization(lr=1.0, warmup=0.5, shape="linear")
    assert [recipe.lr_factor(t) for t in (0.5, 0.75, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_held_to_the_end():
    assert Optimization(hold=1.0).lr_factor(1.0) == 1.0


def test_scheduler_sets_the_learning_rate_of_each_step():
    recipe = Optimization(lr=0.4, warmup=0.0, hold=0.0)
    optimizer = recipe.make_optimizer(nn.Linear(2, 2))
    scheduler = recipe.make_scheduler(optimizer, total_steps=4)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([0.4 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


def test_only_weights_decay():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[3].weight.requires_grad_(False)
    decayed, other = Optimization(weight_decay=0.01).make_optimizer(model).param_groups
    assert decayed["weight_decay"] == 0.01
    assert other["weight_decay"] == 0.0
    assert decayed["params"] == [model[0].weight]
    assert other["params"] == [model[0].bias, model[1].weight, model[1].bias, model[3].bias]


def test_shared_parameters_are_taken_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    (group,) = Optimization().make_optimizer(model).param_groups
    assert group["params"] == [model[0].weight]


def test_default_and_other_optimizers():
    model = nn.Linear(2, 2)
    sgd = Optimization(lr=0.3).make_optimizer(model)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"], sgd.defaults["lr"]) == (
        0.9,
        True,
        0.3,
    )
    adamw = Optimization(optimizer=partial(torch.optim.AdamW, betas=(0.8, 0.9))).make_optimizer(
        model
    )
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.8, 0.9)


def test_weight_decay_stops():
    recipe = Optimization(weight_decay=0.1, weight_decay_until=0.4)
    assert [recipe.weight_decay_at(t) for t in (0.0, 0.39, 0.4, 1.0)] == [0.1, 0.1, 0.0, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"lr": 0.1, "final_lr": 0.2},
        {"weight_decay": -1.0},
        {"warmup": 1.1},
        {"hold": -0.1},
        {"weight_decay_until": 2.0},
        {"shape": "step"},
    ],
)
def test_refuses(options):
    name = list(options)[-1]
    with pytest.raises(ValueError, match=rf"optimizer\.{name}"):
        Optimization(**options)

"""The scan: one layer at a time, nothing left behind; and curves that rise."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blocksparse.sparsity import NM, Block, Pattern, Plan, layer_mask, resolve
from blocksparse.sparsity.curves import Curve, loss_curves
from blocksparse.sparsity.sensitivity import DENSE, Row, points, scan


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 36, 3),
        nn.Flatten(),
        nn.Linear(36, 4),
    )


def plan_of(net: nn.Module, pattern: Pattern | None = None) -> Plan:
    return resolve(net, target=0.25, pattern=pattern or Block(8, 8))


def zeros_of(net: nn.Module) -> dict[str, int]:
    return {
        name: int((module.weight == 0).sum())
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def test_levels_that_come_to_the_same_are_listed_once() -> None:
    net = network()
    todo = points(net, plan_of(net), [0.9, 0.25, 0.3, 0.5])
    assert todo[0].layer == DENSE
    assert todo[0].weights == 16 * 16 + 36 * 16 * 9
    # 2 by 2 blocks, of which the floors keep 2; 5 by 2 blocks, the last row of them half as high.
    assert [(p.layer, round(p.sparsity, 3)) for p in todo[1:]] == [
        ("2", 0.25),
        ("2", 0.5),
        *[("3", round(p.sparsity, 3)) for p in todo[3:]],
    ]
    ragged = [p.sparsity for p in todo[3:]]
    assert ragged == sorted(set(ragged))
    assert all(p.zeros <= round(p.sparsity * p.weights) < p.zeros + 8 * 8 * 9 for p in todo[3:])


@pytest.mark.parametrize("pattern", [Block(8, 8), Block(4, 4, shared=False), NM(2, 4)], ids=str)
def test_each_row_is_of_the_network_with_that_layer_alone_pruned(pattern: Pattern) -> None:
    net = network()
    plan = plan_of(net, pattern)
    todo = points(net, plan, [0.25, 0.5])
    seen = []

    def evaluate(trial: nn.Module) -> tuple[float, float]:
        seen.append(copy.deepcopy(trial.state_dict()))
        with torch.no_grad():  # whatever an evaluation does must not reach the next one
            for value in trial.state_dict().values():
                value.add_(1)
        return float(len(seen)), 1.0 / len(seen)

    before = copy.deepcopy(net.state_dict())
    rows = list(scan(net, plan, todo, evaluate))
    for point, row, state in zip(todo, rows, seen, strict=True):
        assert (row.layer, row.weights, row.sparsity) == (
            point.layer,
            point.weights,
            point.sparsity,
        )
        for name, value in state.items():
            if name == f"{point.layer}.weight":
                mask = layer_mask(
                    before[name], pattern, point.sparsity - 1e-6, plan.score, plan.floors
                )
                assert torch.equal(value, before[name] * mask)
                assert int((value == 0).sum()) == round(point.sparsity * point.weights)
            else:
                assert torch.equal(value, before[name]), (point, name)
    assert [row.loss for row in rows] == list(range(1, len(todo) + 1))
    assert [row.drop for row in rows] == pytest.approx([1.0 - row.accuracy for row in rows])
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_known_rows_are_not_evaluated_again() -> None:
    net = network()
    plan = plan_of(net)
    todo = points(net, plan, [0.25, 0.5])
    calls = []

    def evaluate(trial: nn.Module) -> tuple[float, float]:
        calls.append(zeros_of(trial))
        return sum(calls[-1].values()) / 100, 0.5

    whole = list(scan(net, plan, todo, evaluate))
    # As a file holds it, and not only the first ones.
    known = [
        Row(r.layer, r.weights, round(r.sparsity, 6), r.loss, r.accuracy, r.drop)
        for r in (whole[0], whole[2])
    ]
    calls.clear()
    again = list(scan(net, plan, todo, evaluate, known))
    assert len(calls) == len(todo) - 2
    assert [(r.layer, r.loss, r.drop) for r in again] == [(r.layer, r.loss, r.drop) for r in whole]


@pytest.mark.parametrize(
    ("levels", "pattern", "message"),
    [
        ([0.5, 1.5], Block(8, 8), "level 1.5 is not a sparsity"),
        ([0.0], Block(8, 8), "level 0 is not a sparsity"),
        ([0.6, 0.75], NM(2, 4), r"levels \[0.6, 0.75\]: 2:4 gives at most 0.5"),
        ([], Block(8, 8), "list at least one level"),
    ],
)
def test_levels_that_cannot_be_are_refused(
    levels: Sequence[float], pattern: Pattern, message: str
) -> None:
    net = network()
    with pytest.raises(ValueError, match=message):
        points(net, plan_of(net, pattern), levels)


@given(losses=st.lists(st.floats(-1, 5), min_size=1, max_size=8), dense=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_curves_start_at_zero_and_never_fall(losses: list[float], dense: float) -> None:
    rows = [Row(DENSE, 9, 0.0, dense, 1.0, 0.0)]
    levels = np.linspace(0.1, 0.9, len(losses)).tolist()
    rows += [Row("a", 9, s, x, 0.5, 0.5) for s, x in zip(levels, losses, strict=True)][::-1]
    curve = loss_curves(rows)["a"]
    assert curve.sparsities == (0.0, *levels)
    assert curve.values[0] == 0.0
    assert list(curve.values) == sorted(curve.values)
    added = [x - dense for x in losses]
    if added == sorted(added) and added[0] >= 0:  # nothing to mend
        assert curve.values[1:] == pytest.approx(added)
    assert min(0.0, *added) - 1e-9 <= curve.values[-1] <= max(0.0, *added) + 1e-9


def test_a_dip_is_shared_out_and_not_believed() -> None:
    rows = [Row(DENSE, 9, 0.0, 1.0, 1.0, 0.0)]
    rows += [Row("a", 9, s, x, 1.0, 0.0) for s, x in ((0.2, 1.3), (0.4, 1.1), (0.6, 2.0))]
    assert loss_curves(rows)["a"].values == pytest.approx((0.0, 0.2, 0.2, 1.0))


def test_curves_go_on_straight_beyond_their_last_point() -> None:
    curve = Curve((0.0, 0.5, 0.75), (0.0, 1.0, 3.0))
    assert [curve.at(s) for s in (0.0, 0.25, 0.625, 0.875)] == [0.0, 0.5, 2.0, 4.0]
    assert Curve((0.5,), (2.0,)).at(0.9) == 2.0

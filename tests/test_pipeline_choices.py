"""What layers may take, what other rules come to at the same cost, and the times behind it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from blocksparse.export import export_model
from blocksparse.perf import cost
from blocksparse.pipeline.choices import (
    Choices,
    at_least,
    counted_sparsities,
    matched,
    with_zeros,
)
from blocksparse.pipeline.layer_times import LayerTimes, measure_times
from blocksparse.sparsity import (
    ERK,
    NM,
    Allocation,
    Block,
    Global,
    MaskedWeights,
    Pattern,
    Plan,
    Uniform,
    resolve,
)
from blocksparse.sparsity.curves import Curve
from blocksparse.sparsity.sensitivity import DENSE, Row, points

LEVELS = [0.25, 0.5, 0.625]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 44, 3, padding=1, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(44, 4),
    )


def plan_of(net: nn.Module, pattern: Pattern) -> Plan:
    return resolve(net, target=0.4, pattern=pattern)


def rows_of(net: nn.Module, plan: Plan) -> list[Row]:
    """Each weight that goes of the second layer costs ten times what one of the first does."""
    rows = [Row(DENSE, plan.prunable, 0.0, 1.0, 1.0, 0.0)]
    for point in points(net, plan, LEVELS)[1:]:
        gone = point.sparsity * point.weights * (10 if point.layer == "2" else 1)
        rows.append(Row(point.layer, point.weights, point.sparsity, 1.0 + gone / 1e4, 0.5, 0.5))
    return rows


def test_layers_that_lose_least_go_first() -> None:
    net = network()
    plan = plan_of(net, Block(8, 8))
    choices = Choices.of(net, plan, LEVELS, rows_of(net, plan))
    assert choices.sparsities["1"] == (0.0, 0.25, 0.5, 0.625)
    chosen, solution = choices.cheapest([at_least(0.25, plan)])
    assert chosen == {"1": 0.625, "2": 0.0}
    assert solution.loss == pytest.approx(0.625 * 32 * 32 * 9 / 1e4)
    assert choices.loss(chosen) == pytest.approx(solution.loss)


def test_groups_obey_all_or_not_at_all() -> None:
    net = network()
    plan = plan_of(net, NM(2, 4))
    choices = Choices.of(net, plan, [0.25, 0.5], rows_of(net, plan))
    assert choices.sparsities == {"1": (0.0, 0.5), "2": (0.0, 0.5)}


@pytest.mark.parametrize("pattern", [Block(8, 8), Block(4, 4, shared=False), NM(2, 4)], ids=str)
@pytest.mark.parametrize("rule", [Uniform(), Global(), ERK()], ids=lambda r: type(r).__name__)
def test_rules_come_to_the_same_cost(rule: Allocation, pattern: Pattern) -> None:
    net = network()
    plan = plan_of(net, pattern)
    sizes = {layer.name: layer.size for layer in plan.pruned}

    def kept(sparsities: Mapping[str, float]) -> float:
        return sum(size * (1 - sparsities[name]) for name, size in sizes.items())

    most = 0.7 * plan.prunable
    found = matched(net, plan, rule, kept, most)
    assert found is not None
    block = 8 * 8 * 9
    assert most - len(sizes) * block < kept(found) <= most
    # It is what pruning really leaves, as counted in the weights.
    masked = MaskedWeights(with_zeros(plan, found))
    masked.adopt(masked.build(net, 1.0))
    masked.impose(net)
    assert masked.count(net) == {
        f"{name}.weight": round(sparsity * sizes[name]) for name, sparsity in found.items()
    }
    assert matched(net, plan, rule, kept, 0.0) is None  # the floors keep more


def test_uniform_is_uniform() -> None:
    net = network()
    found = counted_sparsities(net, plan_of(net, Block(8, 8)), Uniform(), 0.5)
    assert found["1"] == 0.5
    assert 0.5 <= found["2"] < 0.5 + 8 * 8 / (44 * 32)


def test_times_are_a_constant_and_a_sum() -> None:
    curve = Curve((0.0, 0.5), (3.0, 1.0))
    times = LayerTimes({"a": 2.0, "b": 4.0}, {"a": curve, "b": curve}, 0.5, (0.0,), 6.5, 1)
    assert times.network({"a": 0.0, "b": 0.0}) == 6.5  # stored dense
    assert times.network({"a": 0.25, "b": 0.5}) == 0.5 + 2.0 + 1.0
    only = LayerTimes({"a": 2.0}, {"a": Curve((0.5,), (1.0,))}, 0.5, (0.0,), 2.5, 1)
    assert [only.layer("a", s) for s in (0.0, 0.4, 0.5)] == [2.0, 2.0, 1.0]


@pytest.mark.parametrize("pattern", [Block(8, 8), NM(2, 4)], ids=str)
def test_times_of_real_layers(pattern: Pattern) -> None:
    net = network()
    plan = plan_of(net, pattern)
    model = export_model(net, (3, 8, 8))
    assert {"1", "2"} <= {node.name for node in cost(model)}
    times = measure_times(model, plan, [0.5, 1.0], threads=1, rounds=3, min_seconds=0)
    assert set(times.dense_ms) == {"1", "2"}
    assert all(curve.sparsities[-1] >= 0.5 for curve in times.sparse_ms.values())
    assert min(ms for curve in times.sparse_ms.values() for ms in curve.values) > 0
    lines = times.to_csv().splitlines()
    assert lines[0] == "layer,sparsity,milliseconds"
    assert lines[1].startswith('"1",dense,')


def test_layers_the_file_does_not_name_are_an_error() -> None:
    net = network()
    plan = plan_of(net, Block(8, 8))
    model = export_model(nn.Sequential(network()), (3, 8, 8))
    with pytest.raises(ValueError, match="1, 2: not in the exported network under this name"):
        measure_times(model, plan, [0.5], threads=1, rounds=1, min_seconds=0)

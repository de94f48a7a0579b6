"""The knapsack: the same answer as trying everything, and errors that say what is possible."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksparse.sparsity.knapsack import Infeasible, Limit, solve

small = st.integers(-20, 20)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[Limit]]:
    """Whole numbers, so that no sum lies on either side of a limit by rounding."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))

    def table() -> list[list[float]]:
        return [[float(draw(small)) for _ in range(size)] for size in sizes]

    limits = [
        Limit(f"limit {index}", table(), float(draw(st.integers(-40, 40))))
        for index in range(draw(st.integers(0, 3)))
    ]
    return table(), limits


def best(losses: list[list[float]], limits: list[Limit]) -> float:
    """Try every choice."""
    result = math.inf
    for chosen in product(*(range(len(group)) for group in losses)):

        def total(table: object, chosen: tuple[int, ...] = chosen) -> float:
            return sum(group[index] for group, index in zip(table, chosen, strict=True))  # type: ignore[call-overload]

        if all(total(limit.costs) <= limit.most for limit in limits):
            result = min(result, total(losses))
    return result


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_finds_what_trying_everything_finds(
    problem: tuple[list[list[float]], list[Limit]],
) -> None:
    losses, limits = problem
    expected = best(losses, limits)
    if expected == math.inf:
        with pytest.raises(Infeasible):
            solve(losses, limits)
        return
    found = solve(losses, limits)
    assert found.loss == pytest.approx(expected)
    assert sum(g[i] for g, i in zip(losses, found.chosen, strict=True)) == found.loss
    for limit in limits:
        costs = (g[i] for g, i in zip(limit.costs, found.chosen, strict=True))
        assert sum(costs) <= limit.most + 1e-4
    assert found.bound <= found.loss
    assert found.gap <= 1e-4


@st.composite
def uneven_problems(draw: st.DrawFn) -> tuple[list[list[float]], list[Limit]]:
    """Costs over sixteen orders of magnitude, and limits that some choice just keeps."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    value = st.builds(lambda m, e: m * 10.0**e, st.floats(0.1, 1.0), st.integers(-8, 8))

    def table() -> list[list[float]]:
        return [[draw(value) for _ in range(size)] for size in sizes]

    limits = []
    for index in range(draw(st.integers(1, 2))):
        costs = table()
        most = sum(draw(st.sampled_from(group)) for group in costs)
        limits.append(Limit(f"limit {index}", costs, most))
    losses = [[draw(st.floats(0.0, 10.0)) for _ in range(size)] for size in sizes]
    return losses, limits


@given(problem=uneven_problems())
@settings(max_examples=60, deadline=None)
def test_costs_of_very_different_size(problem: tuple[list[list[float]], list[Limit]]) -> None:
    losses, limits = problem
    # Rounding must not decide whether a choice keeps a limit.
    expected = best(
        losses, [Limit(each.name, each.costs, each.most * (1 + 1e-12)) for each in limits]
    )
    if expected == math.inf:
        return
    found = solve(losses, limits)
    assert found.bound <= expected + 1e-4
    assert found.loss <= expected + 1e-4
    for limit in limits:
        total = sum(g[i] for g, i in zip(limit.costs, found.chosen, strict=True))
        assert total <= limit.most * (1 + 3e-6)


def test_small_units_count_as_much_as_large_ones() -> None:
    # Milliseconds of a tiny layer, and weights of a large one: HiGHS has absolute tolerances.
    for unit in (1e-6, 1.0, 1e9):
        costs = [[3 * unit, 1 * unit], [3 * unit, 1 * unit]]
        found = solve([[0.0, 0.5e-6], [0.0, 0.2e-6]], [Limit("cost", costs, 4 * unit)])
        assert found.chosen == (0, 1), unit


def test_limits_at_least_are_limits_negated() -> None:
    gone = Limit("weights that go", [[0.0, -10.0], [0.0, -30.0]], -30.0)
    assert solve([[0.0, 1.0], [0.0, 5.0]], [gone]).chosen == (0, 1)


def test_what_cannot_be_says_how_little_could() -> None:
    ms = Limit("milliseconds", [[3.0, 1.0], [2.0, 1.5]], 2.0)
    with pytest.raises(Infeasible, match=r"milliseconds: at most 2 .* can be had is 2\.5"):
        solve([[0.0, 1.0], [0.0, 1.0]], [ms])
    one = Limit("ms", [[0.0, 1.0]], 0.0)
    other = Limit("weights", [[1.0, 0.0]], 0.0)
    with pytest.raises(Infeasible, match=r"limits together \(ms: at most 0, alone.*; weights"):
        solve([[0.0, 0.0]], [one, other])


@pytest.mark.parametrize(
    ("losses", "costs", "message"),
    [
        ([[0.0, 1.0]], [[0.0]], r"ms: has \[1\] choices per group, the losses \[2\]"),
        ([[0.0], []], [[0.0], []], "at least one in every group"),
        ([[0.0, math.nan]], [[0.0, 1.0]], "losses: a value is not finite"),
        ([[0.0, 1.0]], [[0.0, math.inf]], "ms: a value is not finite"),
    ],
)
def test_refuses_what_is_no_problem(
    losses: list[list[float]], costs: list[list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        solve(losses, [Limit("ms", costs, 1.0)])


def test_nothing_to_choose_is_nothing() -> None:
    assert solve([], []).chosen == ()

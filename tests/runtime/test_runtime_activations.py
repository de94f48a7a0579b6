"""Activations that no clamp can express, at the end of products: the same as behind them."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from bare import LANES, assert_nothing_else_written, assert_zeros_around, engine_of, run_over
from definition import correlate
from models import Builder, randoms

from blocksparse.runtime.algorithms import Algorithm, ways
from blocksparse.runtime.kernels import records
from blocksparse.runtime.pieces import cut
from blocksparse.runtime.steps import lower

ACTIVATIONS = ["sigmoid", "silu", "hardsigmoid", "hardswish"]
BLOCKS = ("bsr", (8, 8), 0.5)

CASES = {
    "direct": (Algorithm.DIRECT, (9, 37), {"layout": BLOCKS}),
    "one row": (Algorithm.DIRECT, (9, 37), {"groups": 12}),
    "N:M": (Algorithm.DIRECT, (9, 37), {"layout": ("nm", 2, 4)}),
    "stride": (Algorithm.DIRECT, (19, 37), {"layout": BLOCKS, "stride": (2, 2)}),
    "tail": (Algorithm.DIRECT, (7, 7), {"kernel": (1, 1), "padding": (0, 0)}),
    "one pixel": (Algorithm.DIRECT, (1, 1), {"kernel": (1, 1), "padding": (0, 0)}),
    "columns": (Algorithm.COLUMNS, (9, 37), {"layout": BLOCKS}),
    "rows": (Algorithm.ROWS, (9, 37), {"kernel": (1, 7), "padding": (0, 3)}),
    "tiles": (Algorithm.TILES, (9, 37), {"layout": BLOCKS}),
}


def model_of(image, options, activation, residual):
    """A convolution, perhaps with one more as its residual."""
    b = Builder((12, *image))
    beside = b.conv("x", 12, seed=1, activation="none", **options) if residual else None
    b.conv("x", 12, seed=2, activation=activation, residual=beside, **options)
    return b.model()


def expected_of(model, x, activation):
    """What the definition says, in float64."""
    sums = 0
    for node in model.graph.nodes:
        weight, groups = model.weights[node.name].to_dense(), node.attrs["groups"]
        if groups > 1:  # the definition knows one group
            whole = np.zeros((12, 12, *weight.shape[2:]), np.float32)
            whole[np.arange(12), np.arange(12)] = weight[:, 0]
            weight = whole
        padding, stride = node.attrs["padding"], node.attrs["stride"]
        bias = model.vectors[f"{node.name}.bias"][:, None, None]
        sums = sums + correlate(x, weight, padding, 1, stride) + bias
    return naive.pointwise("same", activation, sums)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES)
def test_a_product_ends_with_it(case, activation, residual, lanes):
    """No step comes behind, and padding is zero, although the sigmoid of zero is not."""
    way, image, options = CASES[case]
    model = model_of(image, options, activation, residual)
    engine = engine_of(model, lanes)
    nodes = model.graph.nodes
    if not all(way in ways(n, model.weights[n.name], engine.target, True) for n in nodes):
        pytest.skip(f"{way} is not for this convolution")
    chosen = dict.fromkeys((node.name for node in nodes), way)
    engine._pieces = cut(lower(model, engine.target, chosen))
    products = [step for step in engine.steps.steps if step.packed is not None]
    assert len(products) == len(nodes)
    assert not any(step.op == records.ELEMENTWISE for step in engine.steps.steps)
    x = randoms(2, 12, *image)
    for threads in (1, 2):
        got, plan, memory = run_over(engine, x, np.nan, threads)
        expected = expected_of(model, x, activation)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
        assert_zeros_around(memory, plan, products[0].op, len(x))
    _, plan, memory = run_over(engine, x, np.float32(-7.25e33))
    assert_nothing_else_written(memory, plan, len(x))
    (one,) = x[:1]
    np.testing.assert_allclose(engine.run(one[None], 2), expected[:1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_behind_a_linear_layer_it_is_a_step(activation):
    b = Builder((20, 1, 1))
    linear = b.linear(b.node("flatten", "x"), 40, activation=activation)
    engine, x = engine_of(b.model()), randoms(3, 20, 1, 1)
    steps = engine.steps.steps
    (step,) = (step for step in steps if step.op == records.ELEMENTWISE)
    assert step.source == step.target
    sums = x[..., 0, 0] @ b.weights[linear].to_dense().T + b.vectors[f"{linear}.bias"]
    expected = naive.pointwise("same", activation, sums[..., None, None])[..., 0, 0]
    np.testing.assert_allclose(engine.run(x, 1), expected, rtol=0, atol=1e-5)

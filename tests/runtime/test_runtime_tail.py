"""The last pixels of direct convolutions, whose vectors run over output channels."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from bare import (
    SENTINEL,
    assert_nothing_else_written,
    assert_zeros_around,
    call,
    forced,
    run_over,
)
from definition import correlate
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Builder, randoms
from test_runtime_pixel import BOUNDS, CHANNEL, finished, integers

from blocksparse.runtime.algorithms import Algorithm
from blocksparse.runtime.kernels import records
from blocksparse.runtime.kernels.kernel import Kernel
from blocksparse.runtime.plan import bind


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "pixels"), [(8, 8, 7), (8, 3, 1), (4, 8, 3), (5, 1, 2)]
)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_sparse_tail(rows, columns, pixels, steps, with_residual):
    """A few pixels, of more rows than the kernel computes at once and of fewer."""
    rng = np.random.default_rng([rows, steps])
    x = integers(rng, 2000)
    weights = integers(rng, 3, steps, columns, rows)
    offsets = rng.integers(-40, 400, steps).astype(np.int32)
    for exist in (1, rows, 2 * rows + 1):
        bias = integers(rng, 3 * rows)
        residual = integers(rng, exist, pixels + 3)
        y = np.full((exist + 1, pixels + 5), SENTINEL)
        call(
            Kernel("sparse_tail", rows, columns, pixels), 16, x[40:], weights, offsets, steps,
            4 * CHANNEL, y, y.strides[0], bias, residual if with_residual else 0,
            residual.strides[0], exist, BOUNDS, weights[0].nbytes,
        )  # fmt: skip
        sums = np.concatenate(
            [naive.sparse_product(x, own, offsets + 40, CHANNEL, pixels) for own in weights]
        )[:exist]
        beside = residual[:, :pixels] if with_residual else 0
        expected = finished(sums, bias[:exist], beside, np.ones(pixels, bool))
        np.testing.assert_array_equal(y[:exist, :pixels], expected)
        assert (y[:, pixels:] == SENTINEL).all()
        assert (y[exist:] == SENTINEL).all()


def convolution(image, kernel, outputs, layout, residual):
    """A convolution, perhaps with one more as its residual; and its input channels."""
    b = Builder((8, *image))
    options = {"kernel": kernel, "padding": (kernel[0] // 2, kernel[1] // 2), "layout": layout}
    beside = b.conv("x", outputs, seed=1, activation="none", **options) if residual else None
    b.conv("x", outputs, seed=2, activation="relu", residual=beside, **options)
    return b.model()


def expected_of(model, x):
    """What the definition says, in float64."""
    y = 0
    for node in model.graph.nodes:
        bias = model.vectors[f"{node.name}.bias"][:, None, None]
        weight = model.weights[node.name].to_dense()
        y = y + correlate(x, weight, node.attrs["padding"], 1) + bias
    return np.maximum(y, 0)


def tails(plan):
    """Whether each convolution has a tail."""
    return (
        plan.records[plan.records[:, records.OP] == records.CONV][:, records.TAIL] != 0
    ).tolist()


@pytest.mark.parametrize("lanes", [4, 8, 16])
@settings(max_examples=40)
@given(
    image=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    kernel=st.sampled_from([(1, 1), (1, 1), (3, 3), (1, 3)]),
    outputs=st.sampled_from([4, 8, 12, 20]),
    layout=st.sampled_from(["dense", ("bsr", (8, 8), 0.5), ("bsr", (16, 4), 0.3)]),
    residual=st.booleans(), batch=st.integers(1, 3), threads=st.integers(1, 2),
)  # fmt: skip
def test_every_pixel_of_a_layer(lanes, image, kernel, outputs, layout, residual, batch, threads):
    model = convolution(image, kernel, outputs, layout, residual)
    engine = forced(model, Algorithm.DIRECT, lanes)
    x = randoms(batch, 8, *image)
    got, plan, memory = run_over(engine, x, SENTINEL, threads)
    np.testing.assert_allclose(got, expected_of(model, x), rtol=0, atol=1e-4)
    assert_nothing_else_written(memory, plan, batch)
    assert_zeros_around(memory, plan, records.CONV, batch)


@pytest.mark.parametrize(
    ("image", "lanes", "expected"),
    [
        ((7, 7), 16, True),  # rows of 8: 55 pixels, three vectors and 7
        ((14, 14), 16, True),  # 209: one pixel
        ((28, 28), 16, False),  # 811: 11 pixels are most of a vector
        ((56, 56), 16, False),  # 3191: one of 200 vectors
        ((14, 14), 8, True),
        ((7, 7), 8, False),
        ((1, 15), 16, False),  # no vector at all
        ((10, 1), 16, False),  # 19: one of the last three is padding
    ],
)
def test_where_a_tail_pays(image, lanes, expected):
    model = convolution(image, (3, 3), 8, "dense", False)
    engine = forced(model, Algorithm.DIRECT, lanes)
    assert tails(bind(engine.model, engine.steps, engine.target, 1)) == [expected]

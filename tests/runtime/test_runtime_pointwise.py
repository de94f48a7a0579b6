"""Element-wise kernels against their definition, and what they leave alone."""

from __future__ import annotations

from itertools import product

import naive
import numpy as np
import pytest
from bare import (
    LANES,
    SENTINEL,
    assert_nothing_else_written,
    assert_zeros_around,
    bits,
    call,
    engine_of,
    run_over,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Builder, randoms

from blocksparse.format import ACTIVATIONS
from blocksparse.runtime import reference
from blocksparse.runtime.kernels import records
from blocksparse.runtime.kernels.kernel import Kernel

FUNCTIONS = ("same", "add", "mul", "gate", "affine")

ULP = 4
"""Units in the last place: 3 of exp, the sum and the quotient, and one of what goes in."""

SPECIAL = [
    0.0, -0.0, 3, -3, 6, 6.5, -7, 1e-40, -1e-40, 86, -86, 88.5, -88.5, 89, -89, 104, -104, 1e20,
    -1e20, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan,
]  # fmt: skip


def nasty(*shape, seed=0, most=np.inf):
    """Random numbers up to a few tens, among them all that is special, but none above `most`."""
    rng = np.random.default_rng([seed, *shape])
    values = rng.standard_normal(shape) * rng.choice([1, 5, 30], shape)
    odd = rng.random(shape) < 0.2
    values[odd] = rng.choice(SPECIAL, odd.sum())
    return np.clip(values, -most, most).astype(np.float32)


def most_of(function):
    """The largest number whose sums and products do not overflow on the way to an activation."""
    return np.inf if function == "same" else 1e9


def assert_near(got, expected, least=3e-37):
    """Within some units of the last place; NaN and infinity are where they should be.

    Parameters
    ----------
    got : ndarray of float32
    expected : ndarray of float64
    least : float or ndarray
        A difference that is always allowed.
    """
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    with np.errstate(over="ignore"):
        rounded = np.where(np.isnan(expected), 0, expected).astype(np.float32)
    infinite = np.isinf(rounded)
    np.testing.assert_array_equal(np.where(np.isnan(got), 0, got)[infinite], rounded[infinite])
    finite = np.isfinite(expected) & ~infinite
    unit = np.spacing(np.abs(rounded[finite])).astype(float)
    error = np.abs(got[finite] - expected[finite])
    allowed = np.maximum(ULP * unit, np.broadcast_to(least, got.shape)[finite])
    assert (error <= allowed).all(), (error / unit).max()


def apply(activation, x, lanes):
    """Call a kernel on a line of numbers."""
    count = -(-len(x) // lanes)
    padded, y = np.zeros(count * lanes, np.float32), np.full(len(x) + 16, SENTINEL)
    padded[: len(x)] = x
    all_of_x = bits(np.arange(count * lanes) < len(x), lanes)
    kernel = Kernel("pointwise_same", activation=activation)
    call(kernel, lanes, padded, 0, y, 0, 0, 0, 0, 0, all_of_x, all_of_x, 0, 1, count)
    assert (y[len(x) :] == SENTINEL).all()
    return y[: len(x)]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_sigmoid_and_silu_are_off_by_three_units_at_most(activation, lanes):
    """Against float64: floats of all magnitudes, and those where the result is neither 0 nor 1."""
    every = np.arange(0, 2**32, 9973, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = np.concatenate([every, np.linspace(-104, 104, 400_001, dtype=np.float32)])
    x = np.concatenate([x, np.float32(SPECIAL)])
    got = apply(activation, x, lanes)
    with np.errstate(all="ignore"):
        wide = x.astype(float)
        gate = 1 / (1 + np.exp(-wide))
        expected = gate if activation == "sigmoid" else wide / (1 + np.exp(-wide))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[np.isinf(expected)], expected[np.isinf(expected)])
    unit = np.spacing(np.abs(expected[finite]).astype(np.float32)).astype(float)
    error = np.abs(got[finite] - expected[finite])
    assert (error <= np.maximum(3 * unit, 3e-37)).all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_clamps_pass_what_they_do_not_clamp(activation, lanes):
    x = nasty(999, seed=1)
    expected = [naive.activate(value, activation) for value in x.tolist()]
    np.testing.assert_array_equal(apply(activation, x, lanes), np.float32(expected))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_kernel_writes_its_pixels_and_nothing_else(function, lanes):
    """Some vectors of a run, in place or not: zeros in the padding, the rest as it was."""
    rng = np.random.default_rng([len(function), lanes])
    for run, first, in_place in product((1, 3, 15, 16, 17, 33, 49), (0, 1), (False, True)):
        vectors = -(-run // lanes)
        if first >= vectors:
            continue
        length = vectors * lanes
        x, other = randoms(3, length + 5, seed=1), randoms(3, length + 7, seed=2)
        scale, shift = randoms(3, seed=3), randoms(3, seed=4)
        y = x if in_place else np.full((3, length + 11), SENTINEL)
        source, before = x.copy(), y.copy()
        inside = (np.arange(length) < run) & (rng.random(length) < 0.8)
        within = np.arange(length) < run
        call(
            Kernel(f"pointwise_{function}", activation="relu"), lanes, x, x.strides[0], y,
            y.strides[0], other, other.strides[0], scale, shift, bits(inside, lanes),
            bits(within, lanes), first, 3, vectors - first,
        )  # fmt: skip
        start = first * lanes
        values = source[None, :, None, :run]
        beside = other[None, :, None, : 1 if function == "gate" else run]
        expected = naive.pointwise(function, "relu", values, beside, scale, shift)[0, :, 0]
        expected = np.where(inside[:run], expected, 0)
        # one rounding of a product and one of a sum, which may cancel
        scale_of = np.abs(values[0, :, 0] * scale[:, None]) + np.abs(shift)[:, None]
        assert_near(y[:, start:run], expected[:, start:], 2 * 2.0**-24 * scale_of[:, start:])
        np.testing.assert_array_equal(y[:, :start], before[:, :start])
        np.testing.assert_array_equal(y[:, run:], before[:, run:])
        assert not np.signbit(y[:, start:run][:, ~inside[start:run]]).any()


def model_of(function, activation, shape, concat=False):
    """An element-wise node; with `concat`, as the middle one of three parts."""
    b = Builder(shape if len(shape) == 3 else (*shape, 1, 1))
    x = "x" if len(shape) == 3 else b.node("flatten", "x")
    if function == "gate":
        node = b.node("mul", x, b.node("adaptive_avg_pool2d", x, output_size=(1, 1)))
    elif function == "mul":
        node = b.node("mul", x, x)
    elif function == "add":
        node = b.node("add", x, x, activation=activation)
    elif function == "affine":
        node = b.node("affine", x, activation=activation)
    else:
        node = b.node("activation", x, activation=activation)
    if concat:
        parts = [b.node("activation", x, activation="relu") for _ in range(2)]
        b.node("concat", parts[0], node, parts[1])
    return b.model(), node


def expected_of(function, activation, model, node, x):
    """What the node computes, (N, C, H, W)."""
    with np.errstate(invalid="ignore", over="ignore"):
        gate = naive.adaptive_avg_pool2d(x, 1).astype(np.float32) if function == "gate" else x
    scale, shift = (model.vectors.get(f"{node}.{part}") for part in ("scale", "shift"))
    activation = "none" if function in ("mul", "gate") else activation
    return naive.pointwise(function, activation, x, gate, scale, shift)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("function", FUNCTIONS)
@settings(max_examples=15)
@given(
    activation=st.sampled_from(ACTIVATIONS[1:]), channels=st.integers(1, 5),
    image=st.sampled_from([(1, 1), (1, 17), (3, 1), (2, 3), (7, 7), (3, 16), (5, 14), (2, 33)]),
    batch=st.integers(1, 3), concat=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_feature_maps(function, lanes, activation, channels, image, batch, concat, seed):
    model, node = model_of(function, activation, (channels, *image), concat)
    x = nasty(batch, channels, *image, seed=seed, most=most_of(function))
    engine = engine_of(model, lanes)
    got, plan, memory = run_over(engine, x, SENTINEL)
    if concat:
        relu = naive.pointwise("same", "relu", x)
        np.testing.assert_array_equal(got[:, :channels], relu)
        np.testing.assert_array_equal(got[:, 2 * channels :], relu)
        got = got[:, channels : 2 * channels]
    expected = expected_of(function, activation, model, node, x)
    least = 3e-37
    if function == "affine":  # what cancels, times a slope of hardswish of at most 1.5
        per_channel = [model.vectors[f"{node}.{p}"][:, None, None] for p in ("scale", "shift")]
        least = 2.0**-21 * (np.abs(x * per_channel[0]) + np.abs(per_channel[1]))
    if function == "gate":  # a mean of float32 sums, in which large numbers may cancel
        error = 2.0**-21 * np.abs(x).mean(axis=(2, 3), keepdims=True)
        least = np.maximum(least, error * np.abs(x))
    assert_near(got, expected, least)
    assert_nothing_else_written(memory, plan, batch)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("image", [(1, 1), (4, 7), (5, 16)], ids=str)
@pytest.mark.parametrize("padding", [(1, 1), (2, 0), (0, 3)], ids=str)
def test_a_convolution_finds_zeros_around(function, image, padding):
    """Whatever memory held, and whatever padding the reader asks for."""
    model, node = model_of(function, "sigmoid", (3, *image))
    b = Builder((3, *image))
    b.nodes, b.vectors = list(model.graph.nodes), model.vectors
    b.shapes.update({part.name: part.shape for part in b.nodes})
    taps = tuple(2 * p + 1 for p in padding)
    b.conv(node, 2, kernel=taps, padding=padding, activation="none")
    x = randoms(3, 3, *image)
    engine = engine_of(b.model())
    clean, _, _ = run_over(engine, x, 0)
    dirty, plan, memory = run_over(engine, x, np.nan)
    np.testing.assert_array_equal(dirty, clean)
    assert_zeros_around(memory, plan, records.ELEMENTWISE, len(x))
    np.testing.assert_allclose(clean, reference.run(b.model(), x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("function", ["same", "add", "mul", "affine"])
@pytest.mark.parametrize("features", [1, 4, 16, 37])
@pytest.mark.parametrize("concat", [False, True])
def test_vectors(function, features, concat):
    """Between the vectors of two images lies the rest of a concatenation."""
    x = nasty(3, features, 1, 1, most=most_of(function))
    for activation, lanes in product(("relu", "silu"), LANES):
        model, node = model_of(function, activation, (features,), concat)
        got, plan, memory = run_over(engine_of(model, lanes), x, SENTINEL)
        if concat:
            np.testing.assert_array_equal(got[:, :features], got[:, 2 * features :])
            got = got[:, features : 2 * features]
        expected = expected_of(function, activation, model, node, x)[..., 0, 0]
        least = 3e-37
        if function == "affine":
            scale, shift = (model.vectors[f"{node}.{part}"] for part in ("scale", "shift"))
            least = 2.0**-21 * (np.abs(x[..., 0, 0] * scale) + np.abs(shift))
        assert_near(got, expected, least)
        assert_nothing_else_written(memory, plan, len(x))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(3, 70, 90), (300, 7, 7)], ids=str)
def test_threads_compute_the_same_bits(function, shape):
    """Items of vectors, which end in the middle of a row, and items of channels."""
    model, _ = model_of(function, "silu", shape)
    x = nasty(2, *shape)
    engine = engine_of(model)
    alone, plan, _ = run_over(engine, x, np.nan)
    (step,) = (p for p in plan.records if p[records.OP] == records.ELEMENTWISE)
    assert step[records.ITEMS] > 1
    assert bool(step[records.BY_CHANNELS]) == (shape[0] == 300)
    for threads in (2, 3):
        together, _, memory = run_over(engine, x, SENTINEL, threads)
        np.testing.assert_array_equal(together.view(np.int32), alone.view(np.int32))
        assert_nothing_else_written(memory, plan, len(x))

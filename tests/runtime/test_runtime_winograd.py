"""Whole convolutions down Winograd's columns against the definition, forced on everywhere."""

from __future__ import annotations

from dataclasses import replace

import naive
import numpy as np
import pytest
from bare import LANES, assert_same_bits, assert_same_over, engine_of
from definition import correlate, without_stride
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Builder, randoms
from winograd_cases import (
    LAYOUTS,
    Case,
    assert_far_within,
    assert_integers_come_out_right,
    assert_within,
    case_of,
    error_bound,
    integers_of,
    normal_of,
    reals_of,
)

from blocksparse.runtime import algorithms, bands, winograd
from blocksparse.runtime.kernels import records
from blocksparse.runtime.kernels.winograd_matrices import FILTERINGS


@pytest.fixture(autouse=True, scope="module")
def _always():
    """Winograd wherever it can run, in bands of a few tile rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithms, "MEASURED_FLOPS", np.inf)  # the rule decides for all layers
        patch.setattr(winograd, "pays", lambda *_: True)
        patch.setattr(bands, "BAND_BYTES", 12 * 1024)
        yield


def test_the_fast_definition_is_the_definition():
    x, w = randoms(2, 3, 6, 7), randoms(4, 3, 3, 2)
    expected = naive.conv2d(x, w, padding=(1, 2), dilation=(1, 2))
    np.testing.assert_allclose(correlate(x, w, (1, 2), 2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rows", "taps"), [(3, 2), (7, 7), (5, 1)])
@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (3, 1)])
def test_a_convolution_of_phases_is_the_definition_with_a_stride(rows, taps, stride):
    x, w = randoms(2, 3, 9, 10), randoms(4, 3, rows, taps)
    expected = naive.conv2d(x, w, padding=(1, 2), stride=stride)
    at_once = correlate(x, w, (1, 2), 1, stride)
    by_phases = correlate(*without_stride(x, w, (1, 2), stride), (0, 0), 1)
    by_phases = by_phases[:, :, : expected.shape[2], : expected.shape[3]]
    for got in (at_once, by_phases):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


CASES = {
    "image": st.tuples(st.integers(1, 13), st.integers(1, 40)),
    "down": st.sampled_from(
        [(3, 1), (3, 1), (4, 1), (5, 1), (7, 1), (5, 2), (6, 2), (7, 2), (7, 2), (9, 2), (11, 4)]
    ),
    "along": st.sampled_from([1, 1, 2, 4]),
    "taps": st.integers(1, 3),
    "padding": st.tuples(st.integers(0, 3), st.integers(0, 2)),
    "dilation": st.integers(1, 3),
    "batch": st.integers(1, 4),
    "channels": st.sampled_from([1, 3, 8, 13]),
    "outputs": st.sampled_from([1, 5, 8, 12]),
    "layout": st.sampled_from(LAYOUTS),
    "residual": st.booleans(),
    "activation": st.sampled_from(["none", "relu", "relu6"]),
}


@pytest.mark.parametrize("lanes", LANES)
@settings(max_examples=50)
@given(case=st.builds(case_of, **CASES), seed=st.integers(0, 9), threads=st.integers(1, 3))
def test_integers_come_out_right(lanes, case, seed, threads):
    numbers = integers_of(case, np.random.default_rng(seed))
    engine = case.engine(*numbers[:2], lanes)
    assert_integers_come_out_right(case, engine, numbers, records.WINOGRAD, threads)


def magnitudes(case, x, weights):
    """Sum the absolute terms of Winograd's way, |A| ((|G| |w|) * (|B| |x|)), per output.

    With a stride there may be more outputs than exist: a tile reads the rows behind the last, too.
    """
    f = FILTERINGS[case.read_rows]
    a, b, g = (np.abs(matrix) for matrix in (f.output, f.input, f.weight))
    (top, left), taps = case.padding, case.taps
    if case.stride != (1, 1):
        x, weights = without_stride(x, weights, case.padding, case.stride)
        top, left, taps = 0, 0, weights.shape[3]
    height = x.shape[2] + 2 * top - f.taps + 1
    end = -(-height // f.outputs) * f.outputs
    bottom = end + f.taps - 1 - x.shape[2] - top
    x = np.pad(np.abs(x).astype(float), ((0, 0), (0, 0), (top, bottom), (left, left)))
    rows = np.stack([x[:, :, i : i + end : f.outputs] for i in range(f.planes)])
    planes = np.einsum("pi,inctw->pnctw", b, rows)
    matrices = np.einsum("pr,kcrs->pkcs", g, np.abs(weights).astype(float))
    width = x.shape[3] - case.dilation * (taps - 1)
    sums = 0
    for s in range(taps):
        near = planes[..., s * case.dilation : s * case.dilation + width]
        sums = sums + np.einsum("pkc,pnctw->pnktw", matrices[..., s], near)
    out = np.einsum("yp,pnktw->nktyw", a, sums)
    return out.reshape(*out.shape[:2], -1, width)[:, :, :height]


def bound_of(case, numbers):
    """Bound the rounding error of every output.

    A term is rounded at most once in its weight's plane, 4 times in its input's (of a row of B up
    to 3 entries of either parity, then both), once at every addition of a product, 5 times in the
    output transform (planes in pairs, of which there are up to 3, and 2 others), once for bias and
    once for the residual; a bias then sees the last two.
    """
    phases = case.stride[0] * case.stride[1]
    sums = case.channels * phases * -(-case.taps // case.stride[1])
    return error_bound(case, numbers, magnitudes, 1 + 4 + sums + 5 + 2)


@settings(max_examples=100)
@given(
    case=st.builds(case_of, **CASES), seed=st.integers(0, 9),
    decades=st.sampled_from([0, 0, 3, 8]),
)  # fmt: skip
def test_reals_stay_within_the_bound_of_their_roundings(case, seed, decades):
    """Also where neighbours differ by sixteen orders of magnitude."""
    numbers = reals_of(case, seed, decades)
    assert_within(case, case.engine(*numbers[:2]), numbers, bound_of(case, numbers))


def test_the_error_is_far_below_the_bound_in_practice():
    case = Case((28, 28), channels=64, outputs=16)
    numbers = normal_of(case)
    assert_far_within(case, case.engine(*numbers[:2]), numbers, bound_of(case, numbers))


@pytest.mark.parametrize("layout", ["dense", ((8, 8), 0.4, False)], ids=["dense", "bsr"])
def test_bits_do_not_depend_on_threads_order_or_repetition(layout):
    case = Case((26, 19), 4, 44, layout=layout, residual=True, activation="relu", batch=3)
    engine = case.engine(case.weights(randoms), randoms(44))
    plan = engine._plan(3, 1).plan
    for record in plan.records[plan.records[:, records.OP] == records.WINOGRAD]:
        assert record[records.PARTS_COUNT] > 1
        assert record[records.ITEMS] > 2 * record[records.PARTS_COUNT], "several bands"
    assert_same_bits(engine, randoms(3, 4, 26, 19))


@pytest.mark.parametrize("layers", [1, 2])
def test_planes_of_another_call_or_step_are_not_taken_for_ones_own(layers):
    """Layers of one band each, called with one image and then another."""
    b = Builder((8, 4, 9))
    x = "x"
    for seed in range(layers):
        x = b.conv(x, 4, seed=seed, activation="none")  # one tile of rows on every target
    model = b.model()
    engine = engine_of(model)
    plan = engine._plan(1, 1).plan
    items = plan.records[plan.records[:, records.OP] == records.WINOGRAD][:, records.ITEMS]
    assert items.tolist() == [1] * layers
    for images in randoms(3, 1, 8, 4, 9):
        got = engine.run(images, 1)
        np.testing.assert_array_equal(got, engine_of(model).run(images, 1))
        want = images
        for weight in model.weights.values():
            bias = randoms(4, seed=7)[:, None, None]
            want = correlate(want, weight.values, (1, 1), 1) + bias
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_within_their_tiles(value):
    """They reach every row of the tiles that read their row, in the columns the kernel reaches.

    A tile's planes mix its six rows, so an infinity meets another one of opposite sign there: what
    comes out is a NaN or an infinity. Everything else keeps its bits.
    """
    case = Case((13, 11), 3, 5, batch=2, padding=(1, 2), dilation=2)
    weights, bias = case.weights(randoms), randoms(5)
    engine = case.engine(weights, bias)
    clean = randoms(2, 3, 13, 11)
    expected = engine.run(clean, 1)
    for row, column in ((0, 0), (3, 5), (4, 10), (7, 3), (12, 10)):
        x = clean.copy()
        x[0, 1, row, column] = value
        got = engine.run(x, 1)
        direct = ~np.isfinite(case.expected(x, weights, bias))
        within = np.zeros_like(direct)
        for tile in range(-(-within.shape[2] // 4)):
            read = range(4 * tile - 1, 4 * tile + 5)
            if row in read:
                columns = direct.any(axis=(1, 2))[:, None, None, :]
                within[:, :, 4 * tile : 4 * tile + 4] |= columns
        assert direct.any()
        assert not np.isfinite(got[direct]).any()
        np.testing.assert_array_equal(got[~within], expected[~within])
        assert np.isfinite(got[~within]).all()


def test_padding_is_zero_whatever_memory_held():
    """A chain in both directions: Winograd's layers before and after others, memory full of NaN."""
    b = Builder((5, 7, 18))
    x = b.conv("x", 8)
    x = b.conv(x, 9, kernel=(5, 5), padding=(2, 2), seed=1)
    x = b.conv(x, 8, kernel=(3, 1), padding=(1, 0), seed=2)
    x = b.conv(x, 8, padding=(0, 2), seed=3)
    b.conv(b.conv(x, 6, padding=(2, 1), seed=4), 4, kernel=(1, 3), padding=(0, 1), seed=5)
    assert_same_over(engine_of(b.model()), randoms(3, 5, 7, 18))


def test_cases_cover_the_ragged_ends():
    """The shapes above do reach partial tiles, several bands, ragged vectors and ragged blocks."""
    case = replace(Case((13, 17)), batch=3, channels=13, outputs=12)
    engine = case.engine(case.weights(randoms), randoms(12), 4)
    record = engine._plan(3, 1).plan.records[1]
    assert record[records.TILE_ROWS_ALL] == 12
    assert record[records.ITEMS] // record[records.PARTS_COUNT] > 1
    assert engine.steps.frames[engine.steps.steps[1].target].row % 4

"""Whole convolutions along Winograd's rows against the definition, forced on everywhere."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from bare import LANES, assert_same_bits, assert_same_over, engine_of, forced, run_over
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

from blocksparse.runtime import algorithms, bands
from blocksparse.runtime.kernels import records
from blocksparse.runtime.kernels.winograd_matrices import ALONG


@pytest.fixture(autouse=True, scope="module")
def _small_bands():
    """Bands of a few units, and no layer worth a measurement."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithms, "MEASURED_FLOPS", np.inf)
        patch.setattr(bands, "BAND_BYTES", 8 * 1024)
        yield


def along_rows(model, lanes=None):
    """The compiled engine, with rows wherever they can be."""
    return forced(model, algorithms.Algorithm.ROWS, lanes)


def lines_of(plan):
    """Records of the convolutions along the rows."""
    return plan.records[plan.records[:, records.OP] == records.LINES_CONV]


CASES = {
    "image": st.tuples(st.integers(1, 9), st.integers(1, 70)),
    "down": st.just((1, 1)),
    "taps": st.sampled_from(list(ALONG)),
    "padding": st.tuples(st.integers(0, 1), st.integers(0, 4)),
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
    weights, bias, x = numbers = integers_of(case, np.random.default_rng(seed))
    engine = along_rows(case.model(weights, bias), lanes)
    got = assert_integers_come_out_right(case, engine, numbers, records.LINES_CONV, threads)
    dirty, _, _ = run_over(engine, x, np.nan, threads)
    np.testing.assert_array_equal(dirty, got)


def magnitudes(row, rows, case, x, weights):
    """Sum the absolute terms of each output, |A| ((|G| |w|) * (|B| |x|)), tile by tile of the line.

    A tile that begins in one row of an image and ends in the next has terms of both.
    """
    f = ALONG[case.taps]
    a, b, g = (np.abs(matrix) for matrix in (f.output, f.input, f.weight))
    n, channels, height, width = x.shape
    top, left = case.padding
    out_height, out_width = height + 2 * top, width + 2 * left - case.taps + 1
    lead = top * row + left
    line = np.zeros((channels, lead + n * rows * row + lead + 2 * f.planes))
    for image in range(n):
        for y in range(height):
            start = lead + (image * rows + y) * row
            line[:, start : start + width] = np.abs(x[image, :, y])
    # output row 0 reads input row -top: one row of the frame further up
    tiles = -(-(n * rows * row) // f.outputs)
    first = f.outputs * np.arange(tiles)
    pixels = np.stack([line[:, np.minimum(first + i, line.shape[1] - 1)] for i in range(f.planes)])
    planes = np.einsum("pi,ict->pct", b, pixels)
    taps = np.einsum("ps,kcs->pkc", g, np.abs(weights[:, :, 0]).astype(float))
    out = np.einsum("yp,pkc,pct->kty", a, taps, planes).reshape(len(weights), -1)
    places = np.add.outer(np.arange(n) * rows * row, np.arange(out_height) * row)
    places = np.add.outer(places, np.arange(out_width))
    return out[:, places].transpose(1, 0, 2, 3)


def bound_of(case, numbers, engine):
    """Bound the rounding error of every output, counted as in `test_runtime_winograd`."""
    frame = engine.steps.frames["x"]
    terms = partial(magnitudes, frame.row, frame.rows)
    return error_bound(case, numbers, terms, 1 + 4 + case.channels + 5 + 2)


@settings(max_examples=100)
@given(
    case=st.builds(case_of, **CASES), seed=st.integers(0, 9),
    decades=st.sampled_from([0, 0, 3, 8]),
)  # fmt: skip
def test_reals_stay_within_the_bound_of_their_roundings(case, seed, decades):
    """Also where neighbours differ by sixteen orders of magnitude."""
    numbers = reals_of(case, seed, decades)
    engine = along_rows(case.model(*numbers[:2]))
    assert_within(case, engine, numbers, bound_of(case, numbers, engine))


@pytest.mark.parametrize("taps", ALONG)
def test_the_error_is_far_below_the_bound_in_practice(taps):
    case = Case((19, 28), 64, 16, rows=1, taps=taps, padding=(0, taps // 2))
    numbers = normal_of(case)
    engine = along_rows(case.model(*numbers[:2]))
    assert_far_within(case, engine, numbers, bound_of(case, numbers, engine))


@pytest.mark.parametrize("layout", ["dense", ((8, 8), 0.4, False)], ids=["dense", "bsr"])
def test_bits_do_not_depend_on_threads_order_or_repetition(layout):
    case = Case(
        (26, 19), 4, 44, rows=1, taps=7, padding=(0, 3), layout=layout, residual=True,
        activation="relu", batch=3,
    )  # fmt: skip
    engine = along_rows(case.model(case.weights(randoms), randoms(44)))
    for record in lines_of(engine._plan(3, 1).plan):
        assert record[records.PARTS_COUNT] > 1
        assert record[records.ITEMS] > 2 * record[records.PARTS_COUNT], "several bands"
    assert_same_bits(engine, randoms(3, 4, 26, 19))


@pytest.mark.parametrize("layers", [1, 2])
def test_planes_of_another_call_or_step_are_not_taken_for_ones_own(layers):
    """Layers of one band each, called with one image and then another."""
    b = Builder((8, 2, 9))
    x = "x"
    for seed in range(layers):  # one tile of rows on every target
        x = b.conv(x, 4, kernel=(1, 3), padding=(0, 1), seed=seed, activation="none")
    model = b.model()
    engine = along_rows(model)
    assert lines_of(engine._plan(1, 1).plan)[:, records.ITEMS].tolist() == [1] * layers
    direct = engine_of(model)
    for images in randoms(3, 1, 8, 2, 9):
        got = engine.run(images, 1)
        np.testing.assert_array_equal(got, along_rows(model).run(images, 1))
        np.testing.assert_allclose(got, direct.run(images, 1), rtol=0, atol=1e-2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("lanes", LANES)
def test_nan_and_infinity_stay_within_their_tiles(lanes, value):
    """They reach the tiles of the line that read them, and everything else keeps its bits."""
    case = Case((6, 35), 3, 5, rows=1, taps=7, padding=(0, 3), batch=2)
    weights, bias = case.weights(randoms), randoms(5)
    engine = along_rows(case.model(weights, bias), lanes)
    row = engine.steps.frames["x"].row
    clean = randoms(2, 3, 6, 35)
    expected = engine.run(clean, 1)
    for y, column in ((0, 0), (3, 5), (4, 34), (5, 34)):
        x = clean.copy()
        x[0, 1, y, column] = value
        got = engine.run(x, 1)
        direct = ~np.isfinite(case.expected(x, weights, bias))
        place = y * row + column
        within = np.zeros_like(direct)
        for i, j in np.ndindex(*within.shape[2:]):
            tile = (i * row + j) // 2 * 2
            within[0, :, i, j] = place in range(tile - 3, tile + 5)
        assert direct.any()
        assert within[direct].all()
        assert not np.isfinite(got[direct]).any()
        np.testing.assert_array_equal(got[~within], expected[~within])
        assert np.isfinite(got[~within]).all()


def test_padding_is_zero_whatever_memory_held():
    """Lines before and after other convolutions and a pool, over memory full of NaN."""
    b = Builder((5, 7, 18))
    x = b.conv("x", 8, kernel=(1, 7), padding=(0, 3))
    x = b.conv(x, 9, kernel=(7, 1), padding=(3, 0), seed=1)
    x = b.conv(x, 8, kernel=(1, 5), padding=(0, 1), seed=2)
    x = b.node("concat", x, b.conv(x, 3, kernel=(1, 1), padding=(0, 0), seed=3))
    x = b.conv(b.conv(x, 6, padding=(1, 1), seed=4), 4, kernel=(1, 3), padding=(0, 1), seed=5)
    b.conv(b.conv(x, 6, stride=(2, 2), seed=6), 3, kernel=(1, 3), padding=(0, 0), seed=7)
    images = randoms(3, 5, 7, 18)
    got = assert_same_over(along_rows(b.model()), images)
    others = engine_of(b.model()).run(images, 1)
    np.testing.assert_allclose(got, others, rtol=0, atol=1e-5 * np.abs(others).max())

"""Whole convolutions through Winograd's F(4x4, 3x3) against the definition, forced on everywhere.

Of small integers the outputs are integers: a wrong tap, mask or row is far outside the rounding
errors. Reals must stay within a bound derived from the number of roundings.
"""

from __future__ import annotations

import numpy as np
import pytest
from bare import (
    LANES,
    SENTINEL,
    assert_nothing_else_written,
    assert_same_bits,
    assert_same_over,
    assert_zeros_around,
    engine_of,
    forced,
    run_over,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Builder, randoms
from winograd_cases import (
    LAYOUTS,
    Case,
    assert_far_within,
    assert_within,
    case_of,
    error_bound,
    normal_of,
    reals_of,
)

from blocksparse.runtime import algorithms, bands
from blocksparse.runtime.kernels import records
from blocksparse.runtime.kernels.winograd_matrices import FILTERINGS


@pytest.fixture(autouse=True, scope="module")
def _small_bands():
    """Bands of a few units, and no layer worth a measurement."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithms, "MEASURED_FLOPS", np.inf)
        patch.setattr(bands, "BAND_BYTES", 24 * 1024)
        yield


def tiled(model, lanes=None):
    """The compiled engine, with tiles in both directions wherever they can be."""
    return forced(model, algorithms.Algorithm.TILES, lanes)


def products_of(plan):
    """Records of the convolutions in tiles."""
    return plan.records[plan.records[:, records.OP] == records.TILES_CONV]


# rows that end with a tile, with a vector of tiles, or a little before or behind one
WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 63, 64, 65]))

CASES = {
    "image": st.tuples(st.integers(1, 20), WIDTHS),
    "taps": st.just(3),
    "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
    "dilation": st.just(1),
    "batch": st.integers(1, 4),
    "channels": st.sampled_from([1, 3, 8, 13]),
    "outputs": st.sampled_from([1, 5, 8, 12]),
    "layout": st.sampled_from(LAYOUTS),
    "residual": st.booleans(),
    "activation": st.sampled_from(["none", "relu", "relu6"]),
}


@pytest.mark.parametrize("lanes", LANES)
@settings(max_examples=50)
@given(
    case=st.builds(case_of, **CASES),
    seed=st.integers(0, 9),
    threads=st.integers(1, 3),
    planes_bytes=st.sampled_from([0, bands.PLANES_BYTES]),
)
def test_small_integers_stay_integers(lanes, case, seed, threads, planes_bytes):
    """With 0, row tiles go through the planes in twos."""
    rng = np.random.default_rng(seed)
    weights = case.weights(lambda *shape: rng.integers(-1, 2, shape))
    bias = rng.integers(-2, 3, case.outputs).astype(np.float32)
    x = rng.integers(-1, 2, (case.batch, case.channels, *case.image)).astype(np.float32)
    engine = tiled(case.model(weights, bias), lanes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "PLANES_BYTES", planes_bytes)
        patch.setattr(bands, "TOGETHER", 2)
        got, plan, memory = run_over(engine, x, SENTINEL, threads)
    assert set(products_of(plan)[:, records.TOGETHER]) == {1 if planes_bytes else 2}
    assert np.abs(got - case.expected(x, weights, bias)).max() < 0.01
    assert_nothing_else_written(memory, plan, case.batch)
    assert_zeros_around(memory, plan, records.TILES_CONV, case.batch)
    dirty, _, _ = run_over(engine, x, np.nan, threads)
    np.testing.assert_array_equal(dirty, got)


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("lanes", LANES)
def test_a_row_longer_than_its_tiles_ends_in_zeros(lanes, width):
    """The tiles end where the image does; the padding columns behind them are zero all the same."""
    b = Builder((3, 9, width))
    b.conv(b.conv("x", 5, padding=(1, 1)), 4, padding=(2, 2), seed=1, activation="none")
    engine = tiled(b.model(), lanes)
    images = randoms(2, 3, 9, width)
    got, plan, memory = run_over(engine, images, SENTINEL)
    assert (products_of(plan)[:, records.SOURCE + 3] > width).all(), "rows are longer"
    assert_nothing_else_written(memory, plan, 2)
    assert_zeros_around(memory, plan, records.TILES_CONV, 2)
    np.testing.assert_allclose(got, engine_of(b.model(), lanes).run(images, 1), rtol=0, atol=1e-3)


def magnitudes(case, x, weights):
    """Sum the absolute terms of each output, |A| (|G| |w| |G'| * |B| |x| |B'|) |A'|."""
    f = FILTERINGS[3]
    a, b, g = (np.abs(matrix) for matrix in (f.output, f.input, f.weight))
    size = [x.shape[2 + i] + 2 * case.padding[i] - 2 for i in range(2)]
    tiles = [-(-length // 4) for length in size]
    pads = [
        (pad, 4 * count + 2 - length - pad)
        for pad, count, length in zip(case.padding, tiles, x.shape[2:], strict=True)
    ]
    x = np.pad(np.abs(x).astype(float), ((0, 0), (0, 0), *pads))
    down, right = 4 * tiles[0], 4 * tiles[1]
    squares = np.stack(
        [[x[:, :, i : i + down : 4, j : j + right : 4] for j in range(6)] for i in range(6)]
    )
    planes = np.einsum("pi,qj,ijnctu->pqnctu", b, b, squares, optimize=True)
    taps = np.einsum("pr,qs,kcrs->pqkc", g, g, np.abs(weights).astype(float), optimize=True)
    sums = np.einsum("pqkc,pqnctu->pqnktu", taps, planes, optimize=True)
    out = np.einsum("yp,xq,pqnktu->nktyux", a, a, sums, optimize=True)
    return out.reshape(*out.shape[:2], down, right)[:, :, : size[0], : size[1]]


def bound_of(case, numbers):
    """Bound the rounding error of every output.

    A term is rounded at most once in its weight's plane, 3 times in each pass over its input (of a
    row of B 2 entries of either parity, then both), once at every addition of a product, 4 times in
    each pass of the output transform (planes in 2 pairs, and 2 others), once for bias and once
    for the residual; a bias then sees the last two.
    """
    return error_bound(case, numbers, magnitudes, 1 + 2 * 3 + case.channels + 2 * 4 + 2)


@settings(max_examples=50)
@given(
    case=st.builds(case_of, **CASES), seed=st.integers(0, 9),
    decades=st.sampled_from([0, 0, 3, 6]),
)  # fmt: skip
def test_reals_stay_within_the_bound_of_their_roundings(case, seed, decades):
    """Also where neighbours differ by twelve orders of magnitude."""
    numbers = reals_of(case, seed, decades)
    assert_within(case, tiled(case.model(*numbers[:2])), numbers, bound_of(case, numbers))


def test_the_error_is_far_below_the_bound_in_practice():
    case = Case((28, 28), channels=64, outputs=16)
    numbers = normal_of(case)
    assert_far_within(case, tiled(case.model(*numbers[:2])), numbers, bound_of(case, numbers))


@pytest.mark.parametrize("layout", ["dense", ((8, 8), 0.4, False)], ids=["dense", "bsr"])
@pytest.mark.parametrize("image", [(26, 70), (26, 19), (9, 7)], ids=str)
def test_bits_do_not_depend_on_threads_order_or_repetition(layout, image):
    case = Case(image, 4, 44, layout=layout, residual=True, activation="relu", batch=3)
    engine = tiled(case.model(case.weights(randoms), randoms(44)))
    for record in products_of(engine._plan(3, 1).plan):
        assert record[records.ITEMS] > record[records.PARTS_COUNT], "several bands"
        assert record[records.PARTS_COUNT] > 1 or image == (26, 70), "bands are items enough"
    assert_same_bits(engine, randoms(3, 4, *image))


@pytest.mark.parametrize("layers", [1, 2])
def test_planes_of_another_call_or_step_are_not_taken_for_ones_own(layers):
    """Layers of one band each, called with one image and then another."""
    b = Builder((8, 4, 9))
    x = "x"
    for seed in range(layers):
        x = b.conv(x, 4, seed=seed, activation="none")  # one tile of rows on every target
    model = b.model()
    engine = tiled(model)
    items = products_of(engine._plan(1, 1).plan)[:, records.ITEMS]
    assert items.tolist() == [1] * layers
    direct = engine_of(model)
    for images in randoms(3, 1, 8, 4, 9):
        got = engine.run(images, 1)
        np.testing.assert_array_equal(got, tiled(model).run(images, 1))
        np.testing.assert_allclose(got, direct.run(images, 1), rtol=0, atol=1e-2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("lanes", LANES)
def test_nan_and_infinity_stay_within_their_tiles(lanes, value):
    """They reach the tiles that read them, where an infinity may meet another one of opposite sign.

    Everything else keeps its bits.
    """
    case = Case((13, 35), 3, 5, batch=2, padding=(1, 2))
    weights, bias = case.weights(randoms), randoms(5)
    engine = tiled(case.model(weights, bias), lanes)
    clean = randoms(2, 3, 13, 35)
    expected = engine.run(clean, 1)
    for row, column in ((0, 0), (3, 5), (4, 34), (7, 17), (12, 30), (12, 34)):
        x = clean.copy()
        x[0, 1, row, column] = value
        got = engine.run(x, 1)
        direct = ~np.isfinite(case.expected(x, weights, bias))
        within = np.zeros_like(direct)
        for i, j in np.ndindex(-(-within.shape[2] // 4), -(-within.shape[3] // 4)):
            if row in range(4 * i - 1, 4 * i + 5) and column in range(4 * j - 2, 4 * j + 4):
                within[0, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = True
        assert direct.any()
        assert within[direct].all()
        assert not np.isfinite(got[direct]).any()
        np.testing.assert_array_equal(got[~within], expected[~within])
        assert np.isfinite(got[~within]).all()


def test_padding_is_zero_whatever_memory_held():
    """Tiles before and after other convolutions and a pool, over memory full of NaN."""
    b = Builder((5, 7, 32))
    x = b.conv("x", 8)
    x = b.conv(x, 9, kernel=(5, 5), padding=(2, 2), seed=1)
    x = b.conv(x, 8, kernel=(3, 1), padding=(1, 0), seed=2)
    x = b.conv(x, 8, padding=(0, 2), seed=3)
    x = b.node("concat", x, b.conv(x, 3, seed=6))
    x = b.conv(b.conv(x, 6, padding=(2, 1), seed=4), 4, kernel=(1, 3), padding=(0, 1), seed=5)
    b.conv(b.conv(x, 6, stride=(2, 2), seed=7), 3, seed=8)
    images = randoms(3, 5, 7, 32)
    got = assert_same_over(tiled(b.model()), images)
    others = engine_of(b.model()).run(images, 1)
    np.testing.assert_allclose(got, others, rtol=0, atol=1e-5 * np.abs(others).max())


@pytest.mark.parametrize(
    ("lanes", "image", "groups", "along"),
    [
        (16, (14, 14), 4, 1),  # 4 tiles across: four rows of them fill a vector
        (16, (16, 16), 4, 1),
        (16, (16, 17), 2, 1),  # 5 tiles: no room for four rows
        (16, (7, 7), 2, 1),  # only two rows of tiles are there
        (16, (8, 32), 2, 1),
        (16, (4, 4), 1, 1),
        (16, (20, 33), 1, 1),
        (16, (20, 64), 1, 1),
        (16, (20, 65), 1, 2),
        (8, (16, 8), 4, 1),
        (8, (16, 9), 2, 1),
        (8, (16, 16), 2, 1),
        (8, (16, 17), 1, 1),
        (8, (5, 70), 1, 3),
        (4, (16, 4), 4, 1),
        (4, (16, 8), 2, 1),
        (4, (16, 16), 1, 1),
        (4, (16, 17), 1, 2),
    ],
)
def test_units_hold_as_many_rows_as_their_lanes_allow(lanes, image, groups, along):
    """Cutting an image into units by hand: as many lanes as possible have a tile."""
    b = Builder((3, *image))
    b.conv("x", 4)
    (record,) = products_of(tiled(b.model(), lanes)._plan(2, 1).plan)
    assert (record[records.GROUPS], record[records.UNITS_ROW]) == (groups, along)
    down = -(-image[0] // (4 * groups))
    assert record[records.TILE_ROWS_IMAGE] == down * along
    assert record[records.TILE_ROWS_ALL] == 2 * down * along


@pytest.mark.parametrize(("lanes", "least"), [(16, 1), (8, 2)])
def test_large_layers_are_cut_into_bands_that_stay_in_cache(lanes, least):
    """Bands are as large as asked for, or the least that keeps the multiply-adds busy."""
    b = Builder((16, 40, 70))
    b.conv("x", 4 if lanes == 8 else 8)
    engine = tiled(b.model(), lanes)
    (record,) = products_of(engine._plan(2, 1).plan)
    (step,) = (step for step in engine.steps.steps if step.op == records.TILES_CONV)
    assert (step.packed.rows < bands.FULL_ROWS) == (least == 2)
    band, units = record[records.BAND], record[records.TILE_ROWS_ALL]
    assert 4 * 36 * 16 * lanes * band <= max(bands.BAND_BYTES, 4 * 36 * 16 * lanes * least)
    assert band >= least
    assert record[records.ITEMS] // record[records.PARTS_COUNT] == -(-units // band)

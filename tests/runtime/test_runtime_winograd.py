"""Whole convolutions down Winograd's columns against the definition, forced on everywhere.

They are tested twice. With small integers, and weights that are multiples of `STEP`, planes are
exact, and results are such multiples plus integers: a wrong tap, mask or row is far outside the
rounding errors. With reals they must stay within a bound derived from the number of roundings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import naive
import numpy as np
import pytest
from bare import (
    LANES,
    SENTINEL,
    assert_nothing_else_written,
    assert_zeros_around,
    engine_of,
    run_over,
    shuffled,
)
from definition import correlate, without_stride
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Builder, block_zeros, randoms
from test_runtime_program import Helpers

from blocksparse.format import BsrWeight, DenseWeight
from blocksparse.runtime import algorithms, bands, products, winograd
from blocksparse.runtime.kernels import records
from blocksparse.runtime.kernels.winograd_matrices import FILTERINGS

UNIT = 2.0**-24
"""Unit roundoff of float32."""

STEP = {3: 18, 4: 90, 5: 90, 7: 90}
"""What weights of so many taps have to be multiples of for planes without rounding."""


@pytest.fixture(autouse=True, scope="module")
def _always():
    """Winograd wherever it can run, in bands of a few tile rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithms, "MEASURED_FLOPS", np.inf)  # the rule decides for all layers
        patch.setattr(winograd, "pays", lambda *_: True)
        patch.setattr(bands, "BAND_BYTES", 12 * 1024)
        yield


@dataclass(frozen=True)
class Case:
    """A convolution of so many rows and columns of taps, perhaps with one more as its residual."""

    image: tuple[int, int]
    channels: int = 3
    outputs: int = 5
    rows: int = 3
    taps: int = 3
    padding: tuple[int, int] = (1, 1)
    dilation: int = 1
    stride: tuple[int, int] = (1, 1)
    layout: object = "dense"
    activation: str = "none"
    residual: bool = False
    batch: int = 1

    @property
    def read_rows(self):
        """Rows of taps on what is read: phase planes, if there is a stride."""
        return -(-self.rows // self.stride[0])

    def weights(self, values):
        """Two weights (K, C, R, S), zero where the layout has no blocks."""
        dense = values(2, self.outputs, self.channels, self.rows, self.taps).astype(np.float32)
        if self.layout == "dense":
            return dense
        block, density, shared = self.layout
        shape = (self.outputs, self.channels, *((1, 1) if shared else (self.rows, self.taps)))
        masks = [block_zeros(np.ones(shape, np.float32), block, density, seed) for seed in (0, 1)]
        return np.stack([d * (m != 0) for d, m in zip(dense, masks, strict=True)])

    def model(self, weights, bias):
        """The convolution, with a second one of the same geometry for a residual."""
        b = Builder((self.channels, *self.image))
        options = {
            "kernel": (self.rows, self.taps), "padding": self.padding,
            "dilation": (1, self.dilation), "stride": self.stride,
        }  # fmt: skip
        side = None
        for i in range(2 if self.residual else 1):
            last = i == self.residual
            name = b.conv("x", self.outputs, residual=side, **options,
                          activation=self.activation if last else "none")  # fmt: skip
            if self.layout == "dense":
                b.weights[name] = DenseWeight.from_dense(weights[i])
            else:
                b.weights[name] = BsrWeight.from_dense(weights[i], self.layout[0])
            b.vectors[f"{name}.bias"] = bias
            side = name
        return b.model()

    def engine(self, weights, bias, lanes=None):
        """The compiled engine, all products of which are Winograd's."""
        engine = engine_of(self.model(weights, bias), lanes)
        ops = {step.op for step in engine.steps.steps if step.packed is not None}
        assert ops == {records.WINOGRAD}
        return engine

    def expected(self, x, weights, bias):
        """What the definition says, in float64."""
        y = sum(
            correlate(x, weights[i], self.padding, self.dilation, self.stride) + bias[:, None, None]
            for i in range(2 if self.residual else 1)
        )
        return np.clip(y, *products.BOUNDS[self.activation])


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


def case_of(image, taps, padding, dilation=1, down=(3, 1), along=1, **options):
    """Grow the image to the least that has an output; `down` is rows of taps, and their stride."""
    rows, stride = down[0], (down[1], along)
    dilation = dilation if stride == (1, 1) else 1
    least = (rows, dilation * (taps - 1) + 1)
    image = tuple(
        max(size, span - 2 * pad) for size, span, pad in zip(image, least, padding, strict=True)
    )
    return Case(
        image, rows=rows, taps=taps, padding=padding, dilation=dilation, stride=stride, **options
    )


LAYOUTS = ["dense", ((8, 8), 0.5, True), ((8, 8), 0.3, False), ((4, 2), 0.4, False),
           ((5, 3), 0.5, True), ((1, 1), 0.2, False), ((8, 8), 0.0, True)]  # fmt: skip

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


def integers_of(case, rng):
    """Weights, bias and images with which all planes are exact."""
    step = STEP[max(case.read_rows, case.taps)]
    most = 2 if step == 18 else 1
    weights = case.weights(lambda *shape: step * rng.integers(-most, most + 1, shape))
    bias = rng.integers(-99, 100, case.outputs).astype(np.float32)
    x = rng.integers(-4, 5, (case.batch, case.channels, *case.image)).astype(np.float32)
    if case.activation == "relu6":  # leave something between the bounds
        return weights / 64, bias / 64, x / 8
    return weights, bias, x


@pytest.mark.parametrize("lanes", LANES)
@settings(max_examples=50)
@given(case=st.builds(case_of, **CASES), seed=st.integers(0, 9), threads=st.integers(1, 3))
def test_integers_come_out_right(lanes, case, seed, threads):
    weights, bias, x = integers_of(case, np.random.default_rng(seed))
    engine = case.engine(weights, bias, lanes)
    got, plan, memory = run_over(engine, x, SENTINEL, threads)
    # rounding errors are below 0.1; scaled by 512 for relu6, and clamped, far below 1e-3
    atol = 1e-3 if case.activation == "relu6" else 0.1
    np.testing.assert_allclose(got, case.expected(x, weights, bias), rtol=0, atol=atol)
    assert_nothing_else_written(memory, plan, case.batch)
    assert_zeros_around(memory, plan, records.WINOGRAD, case.batch)


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


def error_bound(case, x, weights, bias):
    """Bound the rounding error of every output.

    A term is rounded at most once in its weight's plane, 4 times in its input's (of a row of B up
    to 3 entries of either parity, then both), once at every addition of a product, 5 times in the
    output transform (planes in pairs, of which there are up to 3, and 2 others), once for bias and
    once for the residual; a bias then sees the last two.
    """
    count = 2 if case.residual else 1
    phases = case.stride[0] * case.stride[1]
    roundings = 1 + 4 + case.channels * phases * -(-case.taps // case.stride[1]) + 5 + 2
    error = 0
    for i in range(count):
        terms = magnitudes(case, x, weights[i]) + np.abs(bias)[:, None, None]
        # what the residual is rounded to is then added, and rounded, once more
        error = error + terms * (roundings + 1) * UNIT / (1 - (roundings + 1) * UNIT)
    return error


@settings(max_examples=100)
@given(
    case=st.builds(case_of, **CASES), seed=st.integers(0, 9),
    decades=st.sampled_from([0, 0, 3, 8]),
)  # fmt: skip
def test_reals_stay_within_the_bound_of_their_roundings(case, seed, decades):
    """Also where neighbours differ by sixteen orders of magnitude."""
    rng = np.random.default_rng(seed)

    def reals(*shape):
        values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-decades, decades, shape)
        return values.astype(np.float32)

    weights, bias = case.weights(reals), reals(case.outputs)
    x = reals(case.batch, case.channels, *case.image)
    got = case.engine(weights, bias).run(x, 1)
    error = np.abs(got - case.expected(x, weights, bias))
    bound = error_bound(case, x, weights, bias)[:, :, : got.shape[2], : got.shape[3]]
    assert (error <= bound).all(), f"{np.max(error / bound):.2f} of the bound"


def test_the_error_is_far_below_the_bound_in_practice():
    """Roundings mostly cancel: on normal weights and inputs a hundredth of the bound is left."""
    case = Case((28, 28), channels=64, outputs=16)
    weights, bias = case.weights(randoms), randoms(16)
    x = randoms(1, 64, 28, 28)
    expected = case.expected(x, weights, bias)
    error = np.abs(case.engine(weights, bias).run(x, 1) - expected)
    part = np.max(error / error_bound(case, x, weights, bias))
    relative = np.sqrt(np.mean(error**2) / np.mean(expected**2))
    print(f"largest error: {part:.4f} of the bound; root mean square {relative:.1e} of the output")
    assert part < 0.01
    assert relative < 30 * UNIT


@pytest.mark.parametrize("layout", ["dense", ((8, 8), 0.4, False)], ids=["dense", "bsr"])
def test_bits_do_not_depend_on_threads_order_or_repetition(layout):
    case = Case((26, 19), 4, 44, layout=layout, residual=True, activation="relu", batch=3)
    engine = case.engine(case.weights(randoms), randoms(44))
    x = randoms(3, 4, 26, 19)
    expected = engine.run(x, 1)
    plan = engine._plan(3, 1).plan
    for record in plan.records[plan.records[:, records.OP] == records.WINOGRAD]:
        assert record[records.PARTS_COUNT] > 1
        assert record[records.ITEMS] > 2 * record[records.PARTS_COUNT], "several bands"
    for threads in (1, 2, 3, 9):
        for _ in range(3):
            np.testing.assert_array_equal(engine.run(x, threads), expected)
    engine._helpers.close()  # nobody waits any more
    engine._helpers = Helpers()
    engine.run(x, 2)
    shuffled(engine._helpers.calls[0], expected)


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
    engine = engine_of(b.model())
    images = randoms(3, 5, 7, 18)
    clean, _, _ = run_over(engine, images, 0)
    for fill in (np.nan, 1e30):
        dirty, _, _ = run_over(engine, images, fill)
        np.testing.assert_array_equal(dirty, clean)
    assert np.isfinite(clean).all()
    assert np.abs(clean).max() > 0


def test_cases_cover_the_ragged_ends():
    """The shapes above do reach partial tiles, several bands, ragged vectors and ragged blocks."""
    case = replace(Case((13, 17)), batch=3, channels=13, outputs=12)
    engine = case.engine(case.weights(randoms), randoms(12), 4)
    record = engine._plan(3, 1).plan.records[1]
    assert record[records.TILE_ROWS_ALL] == 12
    assert record[records.ITEMS] // record[records.PARTS_COUNT] > 1
    assert engine.steps.frames[engine.steps.steps[1].target].row % 4

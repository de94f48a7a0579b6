"""The parts of Winograd's F(m, r), each against its definition: matrices, weights, kernels."""

from __future__ import annotations

from fractions import Fraction

import naive
import numpy as np
import pytest
from bare import LANES, SENTINEL, bits, call
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Builder, block_zeros, randoms

from blocksparse.format import BsrWeight, DenseWeight
from blocksparse.runtime import winograd
from blocksparse.runtime.kernels.kernel import Kernel
from blocksparse.runtime.kernels.target import Target
from blocksparse.runtime.kernels.winograd_matrices import FILTERINGS
from blocksparse.runtime.layout import round_up
from blocksparse.runtime.prepack import pack

UNIT = 2.0**-24
"""Unit roundoff of float32."""


def exact(matrix):
    return [[Fraction(entry).limit_denominator(1000) for entry in row] for row in matrix]


def apply(matrix, values):
    return [sum(m * v for m, v in zip(row, values, strict=True)) for row in matrix]


@pytest.mark.parametrize("taps", FILTERINGS)
def test_matrices_give_the_correlation_exactly(taps):
    """Both sides are linear in weight and input, so unit vectors stand for all."""
    f = FILTERINGS[taps]
    assert (f.taps, f.planes) == (taps, taps + f.outputs - 1)
    a, b, g = exact(f.output), exact(f.input), exact(f.weight)
    for tap in range(taps):
        for pixel in range(f.planes):
            w = [Fraction(i == tap) for i in range(taps)]
            x = [Fraction(i == pixel) for i in range(f.planes)]
            planes = [u * v for u, v in zip(apply(g, w), apply(b, x), strict=True)]
            expected = [sum(w[r] * x[y + r] for r in range(taps)) for y in range(f.outputs)]
            assert apply(a, planes) == expected


@pytest.mark.parametrize("taps", FILTERINGS)
def test_matrices_are_those_of_toom_and_cook(taps):
    f = FILTERINGS[taps]
    identity = [[Fraction(i == j) for j in range(f.planes)] for i in range(f.planes)]
    rows = [np.array(row, object) for row in identity]
    assert np.array(naive.winograd_input(rows)).tolist() == exact(f.input)
    assert np.array(naive.winograd_output(rows, f.outputs)).tolist() == exact(f.output)
    columns = [np.array(row[:taps], object) for row in identity[:taps]]
    assert exact(np.array(naive.winograd_weight(columns))) == exact(f.weight)


@pytest.mark.parametrize("taps", FILTERINGS)
def test_what_the_kernels_hold_is_exact_in_float32(taps):
    for matrix in (FILTERINGS[taps].input, FILTERINGS[taps].output):
        assert np.array(matrix, np.float32).tolist() == matrix


def planes_of(packed, shape, count=6):
    """Read planes back the way the kernels do: float32 (planes, K, C, S)."""
    k, channels, _, width = shape
    out = np.zeros((count, k, channels, width), np.float32)
    for tile in packed.tiles:
        steps = range(tile.steps.start, tile.steps.stop)
        seen = {(packed.channels[s], packed.positions[s]) for s in steps}
        assert len(seen) == len(steps), "every step once"
        at = tile.values
        for plane in range(count):
            for step in steps:
                for j in range(packed.columns):
                    column = packed.values[at : at + packed.rows]
                    assert not column[tile.rows :].any()
                    where = packed.channels[step] + j, packed.positions[step]
                    out[(plane, slice(tile.first, tile.first + tile.rows), *where)] = column[
                        : tile.rows
                    ]
                    at += packed.rows
    return out


@settings(max_examples=150)
@given(
    lanes=st.sampled_from(LANES),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4)),
    taps=st.sampled_from(list(FILTERINGS)),
    along=st.booleans(),
    layout=st.sampled_from(["dense", "shared", "per position"]),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 3),
)
def test_planes_are_the_transformed_taps(lanes, shape, taps, along, layout, block, density, seed):
    """Down the columns, where kernel columns are left, or along rows of height 1."""
    k, channels, width = shape
    kernel = (1, taps) if along else (taps, width)
    dense = randoms(k, channels, *kernel, seed=seed)
    if layout == "dense":
        weight = DenseWeight.from_dense(dense)
    else:
        mask = np.ones((k, channels, *(kernel if layout == "per position" else (1, 1))))
        dense = dense * (block_zeros(mask.astype(np.float32), block, density, seed) != 0)
        weight = BsrWeight.from_dense(dense, block)
    target = Target("x86_64-unknown-linux-gnu", "generic", "", lanes, 8 if lanes > 8 else 4, 3, 8)
    packed = pack(weight, 1, target)
    planes = (winograd.rows if along else winograd.columns)(packed, kernel)
    assert (planes.rows, planes.columns, planes.group) == (packed.rows, packed.columns, 0)
    assert planes.channels.dtype == planes.positions.dtype == np.int32
    left = 1 if along else width  # kernel columns
    got = planes_of(planes, (k, channels, 1, left), FILTERINGS[taps].planes)
    by_tap = dense.transpose(3, 0, 1, 2) if along else dense.transpose(2, 0, 1, 3)
    expected = np.stack(naive.winograd_weight(list(by_tap.astype(float))))
    # the sum is taken in float64; rounding it once more can move it by one unit in the last place
    np.testing.assert_allclose(got, expected, rtol=2 * UNIT, atol=1e-14)
    for before, after in zip(packed.tiles, planes.tiles, strict=True):
        assert (before.first, before.rows) == (after.first, after.rows)
        stored, kept = before.steps.stop - before.steps.start, after.steps.stop - after.steps.start
        kinds = {
            (packed.channels[s], packed.positions[s] % left)
            for s in range(before.steps.start, before.steps.stop)
        }
        assert kept == len(kinds)
        if layout != "per position":
            assert taps * kept == stored


def test_tiles_of_a_dense_weight_share_their_steps():
    weight = DenseWeight.from_dense(randoms(40, 6, 3, 3))
    planes = winograd.columns(pack(weight, 1, Target("x86_64", "", "", 16, 8, 3, 8)), (3, 3))
    assert len(planes.tiles) == 5
    assert len({(tile.steps.start, tile.steps.stop) for tile in planes.tiles}) == 1
    assert len(planes.channels) == 3


def test_fewer_products_pay_and_transforms_cost():
    """Two stable sides of the rule: many channels pay, one channel does not."""
    for channels, expected in ((256, True), (1, False)):
        packed = pack(
            DenseWeight.from_dense(randoms(channels, channels, 3, 3)),
            1, Target("x86_64", "", "", 16, 8, 3, 8),
        )  # fmt: skip
        rule = winograd.pays(packed, channels, winograd.Geometry((3, 3), 28, 30), 16)
        assert rule is expected


@pytest.mark.parametrize(
    ("kernel", "changes", "columns", "rows"),
    [
        ((3, 3), {}, True, False),
        ((3, 1), {}, True, False),
        ((5, 5), {}, True, False),
        ((7, 2), {}, True, False),
        ((1, 3), {}, False, True),
        ((1, 5), {}, False, True),
        ((1, 7), {}, False, True),
        ((4, 4), {}, True, False),
        ((2, 3), {}, False, False),
        ((1, 4), {}, False, False),
        ((1, 9), {}, False, False),
        ((1, 1), {}, False, False),
        ((3, 3), {"dilation": (1, 2)}, True, False),
        ((3, 3), {"dilation": (2, 1)}, False, False),
        ((1, 3), {"dilation": (2, 1)}, False, True),
        ((1, 3), {"dilation": (1, 2)}, False, False),
        ((3, 3), {"stride": (1, 2)}, True, False),
        ((3, 3), {"stride": (2, 1)}, False, False),
        ((7, 7), {"stride": (2, 2)}, True, False),
        ((11, 11), {"stride": (4, 4)}, True, False),
        ((5, 5), {"stride": (2, 2), "dilation": (1, 2)}, False, False),
        ((7, 7), {"stride": (2, 2), "groups": 2}, False, False),
        ((1, 3), {"stride": (2, 1)}, False, False),
        ((3, 3), {"groups": 2}, False, False),
        ((1, 7), {"groups": 2}, False, False),
    ],
)
def test_what_can_run_this_way(kernel, changes, columns, rows):
    attrs = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, **changes}
    b = Builder((4, 40, 40))
    b.conv("x", 4, kernel=kernel, **attrs)
    node = b.model().graph.nodes[0]
    assert winograd.fits_columns(node, kernel) is columns
    assert winograd.fits_rows(node, kernel) is rows


@pytest.mark.parametrize(("left", "expected"), [(16, True), (17, False)])
def test_a_vector_has_to_hold_the_left_padding(left, expected):
    b = Builder((4, 40, 40))
    b.conv("x", 4, kernel=(3, 3), padding=(1, left))
    target = Target("x86_64-unknown-linux-gnu", "generic", "", 16, 8, 3, 8)
    assert winograd.holds_padding(b.model().graph.nodes[0], target) is expected


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("height", [1, 3, 9])
@pytest.mark.parametrize("taps", FILTERINGS)
def test_winograd_input(taps, lanes, count, height):
    """Two channels; rows above and below the image are zero, and so is the lead if asked for."""
    rng = np.random.default_rng(count)
    length = count * lanes
    x = rng.integers(-99, 100, (2, height, length + 3)).astype(np.float32)
    zeros = np.zeros(length, np.float32)
    planes = FILTERINGS[taps].planes
    for top in (-7, -2, -1, 0, height - 5, height - 1, height):
        for first in (0, 1):
            y = np.full((2, planes, lanes + length + 5), SENTINEL)
            call(
                Kernel("winograd_input", width=taps), lanes, x, x.strides[1], x.strides[0], top,
                height, zeros, y[0, 0, lanes:], y.strides[1], y.strides[0], first, 2, count,
            )  # fmt: skip
            for channel in range(2):
                places = range(top, top + planes)
                rows = [x[channel, i, :length] if 0 <= i < height else zeros for i in places]
                expected = np.stack(naive.winograd_input(rows))
                np.testing.assert_array_equal(y[channel, :, lanes:-5], expected)
            assert (y[:, :, -5:] == SENTINEL).all()
            assert (y[:, :, :lanes] == (0 if first else SENTINEL)).all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("row", [1, 4, 7, 16, 17])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (0, 6)])
@pytest.mark.parametrize("taps", FILTERINGS)
def test_winograd_output(taps, lanes, row, rows, bounds):
    """Rows that exist and no more; the columns of a row that are padding become zero."""
    rng = np.random.default_rng([lanes, row, rows])
    reach = round_up(row, lanes)
    width, f = row - row // 4, FILTERINGS[taps]
    rows = min(rows, f.outputs)
    x = rng.integers(-9, 10, (f.planes, 2, reach)).astype(np.float32)  # planes, channels
    bias = np.array([5, -3], np.float32)
    beside = rng.integers(-9, 10, (2, 5, reach + 3)).astype(np.float32)
    place = np.arange(reach)
    for residual in (0, beside):
        y = np.full((2, 5, reach + 7), SENTINEL)
        call(
            Kernel("winograd_output", width=taps), lanes, x, x.strides[0], x.strides[1], y,
            y.strides[1], y.strides[0], residual, beside.strides[1], beside.strides[0], bias,
            bits(place < width, lanes), bits(place < row, lanes), rows,
            np.array(bounds, np.float32), 2, reach // lanes,
        )  # fmt: skip
        for channel in range(2):
            expected = np.stack(naive.winograd_output(list(x[:, channel]), f.outputs))[:, :width]
            expected = expected + bias[channel]
            if residual is beside:
                expected = expected + beside[channel, : f.outputs, :width]
            got = y[channel, :rows, :width]
            np.testing.assert_array_equal(got, np.clip(expected, *bounds)[:rows])
        assert (y[:, :rows, width:row] == 0).all()
        assert (y[:, :rows, row:] == SENTINEL).all()
        assert (y[:, rows:] == SENTINEL).all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("rows", "columns", "width"), [(8, 8, 3), (4, 4, 2), (5, 3, 1), (1, 1, 3)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_sparse_product(lanes, rows, columns, width, steps):
    """Three tiles, once beside each other with one set of weights, once each with its own."""
    rng = np.random.default_rng([rows, steps])
    x = rng.integers(-9, 10, 1500).astype(np.float32)
    weights = rng.integers(-9, 10, (3, steps, columns, rows)).astype(np.float32)
    offsets = rng.integers(-40, 400, steps + 1).astype(np.int32)  # one more: asked for, not read
    tile = width * lanes
    # what is asked for may lie anywhere
    for x_step, w_step, asked in ((tile, 0, (16, 64, 2)), (7, weights[0].nbytes, (0, 0, 0))):
        y = np.full((3, rows, tile + 5), SENTINEL)
        call(
            Kernel("sparse_product", rows, columns, width), lanes, x[40:], weights, offsets, steps,
            4 * 100, y, y.strides[1], 3, 4 * x_step, w_step, y.strides[0], *asked,
        )  # fmt: skip
        for i in range(3):
            own = weights[i if w_step else 0]
            expected = naive.sparse_product(x, own, offsets + 40 + i * x_step, 100, tile)
            np.testing.assert_array_equal(y[i, :, :-5], expected)
        assert (y[:, :, -5:] == SENTINEL).all()


def test_the_definitions_agree_with_each_other():
    """The planes' products, added up, are the correlation of rows with taps."""
    x, w = randoms(6, 9).astype(float), randoms(3).astype(float)
    planes = [u * v for u, v in zip(naive.winograd_weight(w), naive.winograd_input(x), strict=True)]
    expected = [sum(w[r] * x[y + r] for r in range(3)) for y in range(4)]
    np.testing.assert_allclose(naive.winograd_output(planes), expected, rtol=0, atol=1e-12)

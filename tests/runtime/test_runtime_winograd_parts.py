"""The parts of Winograd's F(4, 3), each against its definition: matrices, weights, kernels."""

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
from blocksparse.runtime.kernels.winograd_matrices import INPUT, OUTPUT, WEIGHT
from blocksparse.runtime.layout import round_up
from blocksparse.runtime.prepack import pack

UNIT = 2.0**-24
"""Unit roundoff of float32."""


def exact(matrix):
    return [[Fraction(entry).limit_denominator(1000) for entry in row] for row in matrix]


def apply(matrix, values):
    return [sum(m * v for m, v in zip(row, values, strict=True)) for row in matrix]


def test_matrices_give_the_correlation_exactly():
    """Both sides are linear in weight and input, so unit vectors stand for all."""
    a, b, g = exact(OUTPUT), exact(INPUT), exact(WEIGHT)
    for tap in range(3):
        for pixel in range(6):
            w = [Fraction(i == tap) for i in range(3)]
            x = [Fraction(i == pixel) for i in range(6)]
            planes = [u * v for u, v in zip(apply(g, w), apply(b, x), strict=True)]
            assert apply(a, planes) == [sum(w[r] * x[y + r] for r in range(3)) for y in range(4)]


def test_matrices_are_those_of_toom_and_cook():
    identity = [[Fraction(i == j) for j in range(6)] for i in range(6)]
    rows = [np.array(row, object) for row in identity]
    assert np.array(naive.winograd_input(rows)).tolist() == exact(INPUT)
    assert np.array(naive.winograd_output(rows)).tolist() == exact(OUTPUT)
    taps = [np.array(row[:3], object) for row in identity[:3]]
    assert exact(np.array(naive.winograd_weight(taps))) == exact(WEIGHT)


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
    layout=st.sampled_from(["dense", "shared", "per position"]),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 3),
)
def test_planes_are_the_transformed_taps(lanes, shape, layout, block, density, seed):
    k, channels, width = shape
    dense = randoms(k, channels, 3, width, seed=seed)
    if layout == "dense":
        weight = DenseWeight.from_dense(dense)
    else:
        mask = np.ones((k, channels, *((3, width) if layout == "per position" else (1, 1))))
        dense = dense * (block_zeros(mask.astype(np.float32), block, density, seed) != 0)
        weight = BsrWeight.from_dense(dense, block)
    target = Target("x86_64-unknown-linux-gnu", "generic", "", lanes, 8 if lanes > 8 else 4, 3, 8)
    packed = pack(weight, 1, target)
    planes = winograd.transform(packed, width)
    assert (planes.rows, planes.columns, planes.group) == (packed.rows, packed.columns, 0)
    assert planes.channels.dtype == planes.positions.dtype == np.int32
    got = planes_of(planes, weight.shape)
    expected = np.stack(naive.winograd_weight([dense[:, :, r].astype(float) for r in range(3)]))
    # the sum is taken in float64; rounding it once more can move it by one unit in the last place
    np.testing.assert_allclose(got, expected, rtol=2 * UNIT, atol=1e-14)
    for before, after in zip(packed.tiles, planes.tiles, strict=True):
        assert (before.first, before.rows) == (after.first, after.rows)
        stored, kept = before.steps.stop - before.steps.start, after.steps.stop - after.steps.start
        kinds = {
            (packed.channels[s], packed.positions[s] % width)
            for s in range(before.steps.start, before.steps.stop)
        }
        assert kept == len(kinds)
        if layout != "per position":
            assert 3 * kept == stored


def test_tiles_of_a_dense_weight_share_their_steps():
    weight = DenseWeight.from_dense(randoms(40, 6, 3, 3))
    planes = winograd.transform(pack(weight, 1, Target("x86_64", "", "", 16, 8, 3, 8)), 3)
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
        rule = winograd.pays(packed, 3, channels, winograd.Geometry(28, 30), 16)
        assert rule is expected


@pytest.mark.parametrize(
    ("kernel", "changes", "expected"),
    [
        ((3, 3), {}, True),
        ((3, 1), {}, True),
        ((3, 3), {"dilation": (1, 2)}, True),
        ((3, 3), {"padding": (5, 16)}, True),
        ((3, 3), {"padding": (1, 17)}, False),
        ((3, 3), {"dilation": (2, 1)}, False),
        ((3, 3), {"stride": (1, 2)}, False),
        ((3, 3), {"stride": (2, 1)}, False),
        ((3, 3), {"groups": 2}, False),
        ((1, 3), {}, False),
        ((2, 3), {}, False),
        ((5, 5), {}, False),
    ],
)
def test_what_can_run_this_way(kernel, changes, expected):
    attrs = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, **changes}
    b = Builder((4, 40, 40))
    b.conv("x", 4, kernel=kernel, **attrs)
    target = Target("x86_64-unknown-linux-gnu", "generic", "", 16, 8, 3, 8)
    assert winograd.applies(b.model().graph.nodes[0], kernel, target) is expected


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("height", [1, 3, 9])
def test_winograd_input(lanes, count, height):
    """Two channels; rows above and below the image are zero, and so is the lead if asked for."""
    rng = np.random.default_rng(count)
    length = count * lanes
    x = rng.integers(-99, 100, (2, height, length + 3)).astype(np.float32)
    zeros = np.zeros(length, np.float32)
    for top in (-7, -2, -1, 0, height - 5, height - 1, height):
        for first in (0, 1):
            y = np.full((2, 6, lanes + length + 5), SENTINEL)
            call(
                Kernel("winograd_input"), lanes, x, x.strides[1], x.strides[0], top, height, zeros,
                y[0, 0, lanes:], y.strides[1], y.strides[0], first, 2, count,
            )  # fmt: skip
            for channel in range(2):
                places = range(top, top + 6)
                rows = [x[channel, i, :length] if 0 <= i < height else zeros for i in places]
                expected = np.stack(naive.winograd_input(rows))
                np.testing.assert_array_equal(y[channel, :, lanes:-5], expected)
            assert (y[:, :, -5:] == SENTINEL).all()
            assert (y[:, :, :lanes] == (0 if first else SENTINEL)).all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("row", [1, 4, 7, 16, 17])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (0, 6)])
def test_winograd_output(lanes, row, rows, bounds):
    """Rows that exist and no more; the columns of a row that are padding become zero."""
    rng = np.random.default_rng([lanes, row, rows])
    reach = round_up(row, lanes)
    width = row - row // 4
    x = rng.integers(-9, 10, (6, 2, reach)).astype(np.float32)  # planes, channels
    bias = np.array([5, -3], np.float32)
    beside = rng.integers(-9, 10, (2, 4, reach + 3)).astype(np.float32)
    place = np.arange(reach)
    for residual in (0, beside):
        y = np.full((2, 4, reach + 7), SENTINEL)
        call(
            Kernel("winograd_output"), lanes, x, x.strides[0], x.strides[1], y, y.strides[1],
            y.strides[0], residual, beside.strides[1], beside.strides[0], bias,
            bits(place < width, lanes), bits(place < row, lanes), rows,
            np.array(bounds, np.float32), 2, reach // lanes,
        )  # fmt: skip
        for channel in range(2):
            expected = np.stack(naive.winograd_output(list(x[:, channel])))[:, :width]
            expected = expected + bias[channel]
            if residual is beside:
                expected = expected + beside[channel, :, :width]
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
    for x_step, w_step in ((tile, 0), (7, weights[0].nbytes)):
        y = np.full((3, rows, tile + 5), SENTINEL)
        call(
            Kernel("sparse_product", rows, columns, width), lanes, x[40:], weights, offsets, steps,
            4 * 100, y, y.strides[1], 3, 4 * x_step, w_step, y.strides[0],
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

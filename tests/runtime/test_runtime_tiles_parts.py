"""Winograd in both directions, part by part against the definitions: weights and kernels."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from bare import LANES, SENTINEL, bits, call
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Builder, block_zeros, randoms
from test_runtime_winograd_parts import UNIT, planes_of

from blocksparse.format import BsrWeight, DenseWeight
from blocksparse.runtime import winograd
from blocksparse.runtime.kernels.kernel import Kernel
from blocksparse.runtime.kernels.target import Target
from blocksparse.runtime.prepack import pack

GROUPS = (1, 2, 4)
"""Tile rows that one vector may hold tiles of."""


def target_of(lanes):
    return Target("x86_64-unknown-linux-gnu", "generic", "", lanes, 8 if lanes > 8 else 4, 3, 8)


def test_the_definitions_agree_with_each_other():
    """The planes' products, added up, are the correlation of pixels with taps."""
    x, w = randoms(6, 6).astype(float), randoms(3, 3).astype(float)
    products = np.multiply(naive.tile_weight(w), naive.tile_input(x))
    expected = naive.conv2d(x[None, None], w[None, None])[0, 0]
    np.testing.assert_allclose(naive.tile_output(products), expected, rtol=0, atol=1e-11)


@settings(max_examples=100)
@given(
    lanes=st.sampled_from(LANES),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    layout=st.sampled_from(["dense", "shared", "per position"]),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 3),
)
def test_planes_are_the_transformed_taps(lanes, shape, layout, block, density, seed):
    dense = randoms(*shape, 3, 3, seed=seed)
    if layout == "dense":
        weight = DenseWeight.from_dense(dense)
    else:
        mask = np.ones((*shape, *((3, 3) if layout == "per position" else (1, 1))), np.float32)
        dense = dense * (block_zeros(mask, block, density, seed) != 0)
        weight = BsrWeight.from_dense(dense, block)
    packed = pack(weight, 1, target_of(lanes))
    planes = winograd.tiles(packed, (3, 3))
    assert (planes.rows, planes.columns, planes.group) == (packed.rows, packed.columns, 0)
    assert planes.channels.dtype == planes.positions.dtype == np.int32
    assert not planes.positions.any(), "nothing is left of the kernel columns"
    got = planes_of(planes, (*shape, 1, 1), 36)[..., 0].reshape(6, 6, *shape)
    taps = dense.astype(float).transpose(2, 3, 0, 1)
    # the sum is taken in float64; rounding it once more can move it by one unit in the last place
    np.testing.assert_allclose(got, naive.tile_weight(taps), rtol=2 * UNIT, atol=1e-14)
    for before, after in zip(packed.tiles, planes.tiles, strict=True):
        assert (before.first, before.rows) == (after.first, after.rows)
        stored, kept = before.steps.stop - before.steps.start, after.steps.stop - after.steps.start
        assert kept == len(set(packed.channels[before.steps].tolist()))
        if layout != "per position":
            assert 9 * kept == stored


@pytest.mark.parametrize(
    ("kernel", "changes", "expected"),
    [
        ((3, 3), {}, True),
        ((3, 3), {"padding": (5, 17)}, True),
        ((3, 3), {"dilation": (1, 2)}, False),
        ((3, 3), {"dilation": (2, 1)}, False),
        ((3, 3), {"stride": (2, 2)}, False),
        ((3, 3), {"groups": 2}, False),
        ((3, 1), {}, False),
        ((3, 4), {}, False),
        ((1, 3), {}, False),
    ],
)
def test_what_can_run_this_way(kernel, changes, expected):
    attrs = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, **changes}
    b = Builder((4, 40, 40))
    b.conv("x", 4, kernel=kernel, **attrs)
    assert winograd.fits_tiles(b.model().graph.nodes[0], kernel) is expected


def tiles_of(lanes, groups, unit):
    """Tile row within the unit and tile column of every lane."""
    across = lanes // groups
    return [(lane // across, unit * across + lane % across) for lane in range(lanes)]


def columns_of(lanes, groups, unit):
    """Output column of every pixel of a unit's four vectors, (4, lanes)."""
    per_row = 4 * lanes // groups
    return np.arange(4 * lanes).reshape(4, lanes) % per_row + unit * per_row


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("lanes", LANES)
@settings(max_examples=40)
@given(
    height=st.integers(1, 18), width=st.integers(1, 70), padding=st.integers(0, 3),
    top=st.integers(-7, 18), unit=st.integers(0, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_tile_input(lanes, groups, height, width, padding, top, unit, seed):
    """Pixels outside the image count as zeros, and what lies there, NaN here, reaches no plane."""
    unit = unit if groups == 1 else 0
    rng = np.random.default_rng(seed)
    lead, first = 16, unit * 4 * lanes - padding  # first: column of the image
    x = np.full((2, height, lead + max(width, unit * 4 * lanes) + 5 * lanes + 8), np.nan)
    x = x.astype(np.float32)
    x[:, :, lead : lead + width] = rng.integers(-99, 100, (2, height, width))
    zeros = np.zeros(8 * lanes, np.float32)
    read = columns_of(lanes, groups, unit) - padding
    masks = np.concatenate([(at >= 0) & (at < width) for at in (read, read + 4)])
    y = np.full((36, 4, lanes + 10), SENTINEL)
    call(
        Kernel("tile_input", 1, groups, 3), lanes, x[0, 0, lead:].ctypes.data + 4 * first,
        x.strides[1], x.strides[0], top, height, zeros, bits(masks, lanes), y[0, 1, 5:],
        y.strides[0], y.strides[1], 2,
    )  # fmt: skip

    def pixel(channel, row, column):
        inside = 0 <= row < height and 0 <= column < width
        return float(x[channel, row, lead + column]) if inside else 0.0

    for lane, (below, across) in enumerate(tiles_of(lanes, groups, unit)):
        up, left = top + 4 * below, 4 * across - padding
        for channel in range(2):
            square = [[pixel(channel, up + i, left + j) for j in range(6)] for i in range(6)]
            expected = np.reshape(naive.tile_input(square), 36)
            np.testing.assert_array_equal(y[:, 1 + channel, 5 + lane], expected)
    y[:, 1:3, 5 : 5 + lanes] = SENTINEL
    assert (y == SENTINEL).all(), "written beside the planes"


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("lanes", LANES)
@settings(max_examples=40)
@given(
    row=st.integers(1, 80), padding=st.integers(0, 3), rows=st.integers(1, 16),
    unit=st.integers(0, 2), bounds=st.sampled_from([(-np.inf, np.inf), (0.0, 6.0)]),
    residual=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_tile_output(lanes, groups, row, padding, rows, unit, bounds, residual, seed):
    """Rows that exist and no more; the columns of a row that are padding become zero."""
    unit, rows = unit if groups == 1 else 0, min(rows, 4 * groups)
    rng = np.random.default_rng(seed)
    width, reach = max(1, row - padding), 4 * lanes * (unit + 1)
    x = rng.integers(-9, 10, (36, 2, lanes)).astype(np.float32)  # planes, channels
    bias = np.array([5, -3], np.float32)
    beside = np.full((2, 4 * groups, reach + 8), np.nan, np.float32)
    beside[:, :, :width] = rng.integers(-9, 10, beside[:, :, :width].shape)
    column = columns_of(lanes, groups, unit)
    y = np.full((4, 4 * groups + 2, reach + 8), SENTINEL)
    first = unit * 4 * lanes
    call(
        Kernel("tile_output", 1, groups, 3), lanes, x, x.strides[0], x.strides[1],
        y[1, 1, first:], y.strides[1], y.strides[0], beside[0, 0, first:] if residual else 0,
        beside.strides[1], beside.strides[0], bias,
        bits(np.concatenate([column < width, column < row]), lanes), rows,
        np.array(bounds, np.float32), 2,
    )  # fmt: skip
    expected = np.full_like(y, SENTINEL)
    for lane, (below, across) in enumerate(tiles_of(lanes, groups, unit)):
        for channel in range(2):
            tile = naive.tile_output(x[:, channel, lane].astype(float).reshape(6, 6))
            for i, j in np.ndindex(4, 4):
                down, right = 4 * below + i, 4 * across + j
                if down < rows and right < row:
                    value = tile[i][j] + bias[channel]
                    value += beside[channel, down, right] if residual else 0
                    value = np.clip(value, *bounds) if right < width else 0
                    expected[1 + channel, 1 + down, right] = value
    np.testing.assert_array_equal(y, expected)

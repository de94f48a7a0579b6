"""The products whose vectors run over pixels, called by themselves at every vector length."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from bare import LANES, SENTINEL, bits, call

from blocksparse.format.weights import index_bits
from blocksparse.runtime.kernels.kernel import Kernel

TILES = 3
CHANNEL = 150
"""Floats from one input channel to the next."""

BOUNDS = np.array([-60, 80], np.float32)


def finished(sums, bias, residual, inside):
    """What the definition of the epilogue makes of sums [rows, pixels]."""
    return np.where(inside, np.clip(sums + bias[:, None] + residual, *BOUNDS), np.float32(0))


def integers(rng, *shape):
    """Small whole numbers: their sums are exact in any order."""
    return rng.integers(-9, 10, shape).astype(np.float32)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("rows", "columns", "width"), [(8, 8, 3), (4, 4, 2), (3, 5, 1), (1, 1, 8)])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_sparse_conv(lanes, rows, columns, width, steps, with_residual):
    """Three tiles side by side, of more rows than the kernel computes at once and of fewer."""
    rng = np.random.default_rng([rows, steps, lanes])
    tile = width * lanes
    x = integers(rng, 2000)
    weights = integers(rng, 3, steps, columns, rows)
    offsets = rng.integers(-40, 400, steps + 1).astype(np.int32)  # one more: asked for, not read
    inside = rng.random(TILES * tile) < 0.8
    for exist in (1, rows, 2 * rows + 1):
        bias = integers(rng, 3 * rows)
        residual = integers(rng, exist, TILES * tile + 3)
        y = np.full((exist + 1, TILES * tile + 5), SENTINEL)
        call(
            Kernel("sparse_conv", rows, columns, width), lanes, x[40:], weights, offsets, steps,
            4 * CHANNEL, y, y.strides[0], bias, residual if with_residual else 0,
            residual.strides[0], bits(inside, lanes), exist, BOUNDS, TILES, weights[0].nbytes,
        )  # fmt: skip
        sums = np.block([
            [naive.sparse_product(x, own, offsets + 40 + i * tile, CHANNEL, tile)
             for i in range(TILES)]
            for own in weights
        ])[:exist]  # fmt: skip
        beside = residual[:, :-3] if with_residual else 0
        np.testing.assert_array_equal(y[:exist, :-5], finished(sums, bias[:exist], beside, inside))
        assert (y[:, -5:] == SENTINEL).all()
        assert (y[exist:] == SENTINEL).all()


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("kept", "group", "width"), [(2, 4, 8), (1, 8, 2), (3, 16, 1)])
@pytest.mark.parametrize("steps", [1, 5])
def test_nm_conv(lanes, kept, group, width, steps, with_residual):
    """Three tiles side by side, from weights whose places are packed bits."""
    rng = np.random.default_rng([kept, steps, lanes])
    tile = width * lanes
    x = integers(rng, 4000)
    weights = integers(rng, steps, kept)
    indices = np.sort(rng.permuted(np.tile(np.arange(group), (steps, 1)), axis=1)[:, :kept])
    size = index_bits(group)
    packed = np.packbits(indices[..., None] >> np.arange(size) & 1, bitorder="little")
    packed = np.append(packed, np.zeros(8, np.uint8))
    offsets = rng.integers(0, 400, steps).astype(np.int32)
    inside = rng.random(TILES * tile) < 0.8
    bias, residual = integers(rng, 1), integers(rng, 1, TILES * tile)
    y = np.full(TILES * tile + 5, SENTINEL)
    call(
        Kernel("nm_conv", 1, kept, width, group), lanes, x, weights, packed, offsets, steps,
        4 * CHANNEL, y, 0, bias, residual if with_residual else 0, 0, bits(inside, lanes), 1,
        BOUNDS, TILES,
    )  # fmt: skip
    sums = np.zeros((1, TILES * tile), np.float32)
    for offset, values, places in zip(offsets, weights, indices, strict=True):
        for value, place in zip(values, places, strict=True):
            sums += value * x[offset + place * CHANNEL :][: TILES * tile]
    expected = finished(sums, bias, residual if with_residual else 0, inside)
    np.testing.assert_array_equal(y[:-5], expected[0])
    assert (y[-5:] == SENTINEL).all()

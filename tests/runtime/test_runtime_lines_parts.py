"""Winograd's transforms along the rows, called alone, against the definition."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from bare import LANES, SENTINEL, bits, call
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksparse.runtime.kernels.kernel import Kernel
from blocksparse.runtime.kernels.winograd_matrices import ALONG


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("taps", ALONG)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_line_input(taps, lanes, count):
    """Two channels; the planes of a tile are those of the pixels from its first one on."""
    f = ALONG[taps]
    rng = np.random.default_rng([lanes, count])
    tiles = count * lanes
    x = rng.integers(-99, 100, (2, tiles * f.outputs + 2 * lanes + 13)).astype(np.float32)
    y = np.full((2, f.planes, tiles + 5), SENTINEL)
    call(
        Kernel("line_input", width=taps), lanes, x[0, 3:], x.strides[0], y[0, 0, 2:],
        y.strides[1], y.strides[0], 2, count,
    )  # fmt: skip
    for channel in range(2):
        first = 3 + f.outputs * np.arange(tiles)
        pixels = [x[channel, first + i].astype(float) for i in range(f.planes)]
        np.testing.assert_array_equal(
            y[channel, :, 2 : 2 + tiles], np.stack(naive.winograd_input(pixels))
        )
    y[:, :, 2 : 2 + tiles] = SENTINEL
    assert (y == SENTINEL).all(), "written beside the planes"


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("taps", ALONG)
@settings(max_examples=40)
@given(
    count=st.integers(1, 4), missing=st.integers(0, 3), seed=st.integers(0, 99),
    bounds=st.sampled_from([(-np.inf, np.inf), (0.0, 6.0)]), residual=st.booleans(),
)  # fmt: skip
def test_line_output(taps, lanes, count, missing, seed, bounds, residual):
    """Vectors that exist and no more; pixels outside the image become zero, whatever is there."""
    f = ALONG[taps]
    rng = np.random.default_rng(seed)
    vectors = count * f.outputs - missing % f.outputs
    reach = vectors * lanes
    inside = rng.random(reach) < 0.8
    x = rng.integers(-9, 10, (f.planes, 2, count * lanes)).astype(np.float32)
    bias = np.array([5, -3], np.float32)
    beside = rng.integers(-9, 10, (2, reach)).astype(np.float32)
    beside[:, ~inside] = np.nan
    y = np.full((4, reach + 9), SENTINEL)
    masks = bits(
        np.pad(inside, (0, count * f.outputs * lanes - reach), constant_values=True), lanes
    )
    call(
        Kernel("line_output", width=taps), lanes, x, x.strides[0], x.strides[1], y[1, 4:],
        y.strides[0], beside if residual else 0, beside.strides[0], bias, masks, vectors,
        np.array(bounds, np.float32), 2, count,
    )  # fmt: skip
    expected = np.full_like(y, SENTINEL)
    for channel in range(2):
        sums = naive.winograd_output(list(x[:, channel].astype(float)), f.outputs)
        pixels = np.stack(sums, axis=1).reshape(-1)[:reach] + bias[channel]
        pixels += beside[channel] if residual else 0
        expected[1 + channel, 4 : 4 + reach] = np.where(inside, np.clip(pixels, *bounds), 0)
    np.testing.assert_array_equal(y, expected)

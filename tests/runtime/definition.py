"""Convolution by its definition in float64, vectorised; checked against `naive`."""

from __future__ import annotations

import numpy as np


def correlate(x, weight, padding, dilation, stride=(1, 1)):
    """Convolve x (N, C, H, W) with weight (K, C, R, S) in float64; NaN stays where it reaches."""
    top, left = padding
    x = np.pad(x.astype(float), ((0, 0), (0, 0), (top, top), (left, left)))
    rows, taps = weight.shape[2:]
    height, width = x.shape[2] - rows + 1, x.shape[3] - dilation * (taps - 1)
    out = np.zeros((len(x), len(weight), height, width))
    for r, s in np.ndindex(rows, taps):
        near = x[:, :, r : r + height, s * dilation : s * dilation + width]
        out += np.einsum("kc,nchw->nkhw", weight[:, :, r, s].astype(float), near)
    return out[:, :, :: stride[0], :: stride[1]]


def without_stride(x, weight, padding, stride):
    """Return the phases of x and of the weight as channels: the same outputs at stride 1, unpadded.

    Every phase has as many taps; those it lacks are zero. There may be more outputs behind the
    last: of rows and columns that nothing reads at the stride.
    """
    down, along = stride
    (rows, taps), (top, left) = weight.shape[2:], padding
    fill = [(0, 0), (0, 0), (0, -rows % down), (0, -taps % along)]
    weight = np.pad(weight, fill)
    height, width = x.shape[2] + 2 * top, x.shape[3] + 2 * left
    whole = np.zeros((*x.shape[:2], height + -height % down, width + -width % along), x.dtype)
    whole[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
    phases = [(i, j) for i in range(down) for j in range(along)]
    return tuple(
        np.concatenate([array[:, :, i::down, j::along] for i, j in phases], axis=1)
        for array in (whole, weight)
    )

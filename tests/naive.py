"""Slow twins of the kernels and the format, written from the definitions with plain loops.

They share no code with the package: pixel by pixel, in Python floats (float64), so that a mistake
would have to be made twice. Only for tiny inputs.

Legend: N batch, C in-channels, K out-channels, H W image, U V output image, R S kernel taps, g
groups, F O features, r c block rows and columns.
"""

from __future__ import annotations

from math import ceil, exp, inf, isnan, prod

import numpy as np


def _pair(value):
    return value if isinstance(value, tuple) else (value, value)


def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Convolve x (N, C, H, W) with weight (K, C/g, R, S), plus bias (K,): (N, K, U, V) float64."""
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    count, _, height, width = x.shape
    filters, depth, taps_h, taps_w = weight.shape
    out_h = (height + 2 * ph - dh * (taps_h - 1) - 1) // sh + 1
    out_w = (width + 2 * pw - dw * (taps_w - 1) - 1) // sw + 1
    out = np.zeros((count, filters, out_h, out_w))
    for n, k, u, v in np.ndindex(*out.shape):
        total = 0.0 if bias is None else float(bias[k])
        first_channel = k // (filters // groups) * depth
        for c, r, s in np.ndindex(depth, taps_h, taps_w):
            row, column = u * sh - ph + r * dh, v * sw - pw + s * dw
            if 0 <= row < height and 0 <= column < width:
                total += float(weight[k, c, r, s]) * float(x[n, first_channel + c, row, column])
        out[n, k, u, v] = total
    return out


def linear(x, weight, bias=None):
    """Multiply x (N, F) with weight (O, F), plus bias (O,): (N, O) float64."""
    out = np.zeros((x.shape[0], weight.shape[0]))
    for n, o in np.ndindex(*out.shape):
        out[n, o] = 0.0 if bias is None else float(bias[o])
        for f in range(x.shape[1]):
            out[n, o] += float(weight[o, f]) * float(x[n, f])
    return out


def pool_size(size, kernel, stride, padding, dilation=1, ceil_mode=False):
    """Count the windows along one axis: those that fit, or with `ceil_mode` those that begin."""
    starts = []
    start = -padding
    while True:
        end = start + dilation * (kernel - 1)
        fits = end < size + padding
        begins = start < size and end - stride < size + padding - 1
        if not (fits or (ceil_mode and begins)):
            return len(starts)
        starts.append(start)
        start += stride


def max_pool2d(x, kernel, stride, padding=0, dilation=1, ceil_mode=False):
    """Take the largest of every window of x (N, C, H, W); a NaN in the window wins."""
    kernel, stride, padding, dilation = map(_pair, (kernel, stride, padding, dilation))
    count, channels, *image = x.shape
    size = [
        pool_size(image[i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode)
        for i in range(2)
    ]
    out = np.full((count, channels, *size), -inf)
    for n, c, u, v in np.ndindex(*out.shape):
        for r, s in np.ndindex(*kernel):
            row = u * stride[0] - padding[0] + r * dilation[0]
            column = v * stride[1] - padding[1] + s * dilation[1]
            if 0 <= row < image[0] and 0 <= column < image[1]:
                pixel = float(x[n, c, row, column])
                if isnan(pixel) or pixel > out[n, c, u, v]:
                    out[n, c, u, v] = pixel
                if isnan(out[n, c, u, v]):
                    break
    return out


def avg_pool2d(x, kernel, stride, padding=0, ceil_mode=False, count_include_pad=True):
    """Average every window of x (N, C, H, W).

    A pixel counts when it is in the image, or with `count_include_pad` in the padding; what
    ceil mode hangs over the padding never counts.
    """
    kernel, stride, padding = map(_pair, (kernel, stride, padding))
    count, channels, *image = x.shape
    size = [pool_size(image[i], kernel[i], stride[i], padding[i], 1, ceil_mode) for i in range(2)]
    out = np.zeros((count, channels, *size))
    for n, c, u, v in np.ndindex(*out.shape):
        total, pixels = 0.0, 0
        for r, s in np.ndindex(*kernel):
            row, column = u * stride[0] - padding[0] + r, v * stride[1] - padding[1] + s
            if 0 <= row < image[0] and 0 <= column < image[1]:
                total += float(x[n, c, row, column])
                pixels += 1
            elif (
                count_include_pad and row < image[0] + padding[0] and column < image[1] + padding[1]
            ):
                pixels += 1
        out[n, c, u, v] = total / pixels
    return out


def adaptive_avg_pool2d(x, output_size):
    """Average x (N, C, H, W) over windows floor(i*H/U) : ceil((i+1)*H/U)."""
    count, channels, height, width = x.shape
    rows, columns = _pair(output_size)
    out = np.zeros((count, channels, rows, columns))
    for n, c, u, v in np.ndindex(*out.shape):
        total, pixels = 0.0, 0
        for row in range(u * height // rows, ceil((u + 1) * height / rows)):
            for column in range(v * width // columns, ceil((v + 1) * width / columns)):
                total += float(x[n, c, row, column])
                pixels += 1
        out[n, c, u, v] = total / pixels
    return out


def bsr_to_dense(shape, block, data, indices, indptr):
    """Spread BSR blocks over a dense weight of `shape`, kernel position major, channels minor."""
    (r, c), (filters, channels) = block, shape[:2]
    taps = shape[2:] if len(shape) == 4 else (1, 1)
    per_position = ceil(channels / c)
    dense = np.zeros((filters, channels, *taps), np.float32)
    for block_row in range(len(indptr) - 1):
        for b in range(indptr[block_row], indptr[block_row + 1]):
            position, channel_block = divmod(int(indices[b]), per_position)
            for i, j in np.ndindex(r, c):
                k, channel = block_row * r + i, channel_block * c + j
                if k < filters and channel < channels:
                    dense[k, channel, position // taps[1], position % taps[1]] = data[b, i, j]
    return dense.reshape(shape)


def nm_to_dense(shape, n, m, values, indices):
    """Spread packed N:M values over a dense weight of `shape`; indices are read bit by bit."""
    filters, channels = shape[:2]
    taps = shape[2:] if len(shape) == 4 else (1, 1)
    bits = 1
    while 2**bits < m:
        bits *= 2
    dense = np.zeros((filters, channels, *taps), np.float32)
    for k in range(filters):
        stream = [byte >> i & 1 for byte in indices[k].tolist() for i in range(8)]
        at = 0
        for position in range(taps[0] * taps[1]):
            for group in range(ceil(channels / m)):
                seen = set()
                for place in range(n):
                    within = sum(bit << i for i, bit in enumerate(stream[at : at + bits]))
                    at += bits
                    if within not in seen:
                        tap = (position // taps[1], position % taps[1])
                        dense[(k, group * m + within, *tap)] = values[k, position, group, place]
                    seen.add(within)
    return dense.reshape(shape)


def phase_planes(x, stride, padding, phases):
    """Split x (N, C, H, W), padded with zeros, into its phases: (N, C * len(phases), U, V).

    The plane of phase (a, b) holds the pixels (a + i * stride, b + j * stride) of the padded image,
    zero where these lie behind it; channels are major, phases minor.
    """
    count, channels, height, width = x.shape
    size = [ceil((x.shape[2 + i] + 2 * padding[i]) / stride[i]) for i in range(2)]
    out = np.zeros((count, channels * len(phases), *size))
    for n, plane, u, v in np.ndindex(*out.shape):
        a, b = phases[plane % len(phases)]
        row, column = u * stride[0] + a - padding[0], v * stride[1] + b - padding[1]
        if 0 <= row < height and 0 <= column < width:
            out[n, plane, u, v] = x[n, plane // len(phases), row, column]
    return out


def activate(value, activation):
    """Apply an activation to a number; NaN passes, and infinity times zero is NaN."""
    if activation == "none" or isnan(value):
        return value
    if activation == "relu":
        return max(value, 0.0)
    if activation == "relu6":
        return min(max(value, 0.0), 6.0)
    if activation in ("hardsigmoid", "hardswish"):
        gate = min(max(value + 3, 0.0), 6.0) / 6
    else:  # in the form that does not overflow
        gate = 1 / (1 + exp(-value)) if value > 0 else exp(value) / (1 + exp(value))
    return value * gate if activation in ("silu", "hardswish") else gate


def pointwise(function, activation, x, other=None, scale=None, shift=None):
    """Combine x (N, C, H, W) with a value of its shape, or with numbers by channel, and activate.

    ``same``: x alone; ``add``, ``mul``: with the same pixel of other; ``gate``: times other
    (N, C, 1, 1); ``affine``: times scale (C,) plus shift (C,). Returns float64.
    """
    out = np.zeros(x.shape)
    for n, c, u, v in np.ndindex(*x.shape):
        value = float(x[n, c, u, v])
        if function == "add":
            value += float(other[n, c, u, v])
        elif function == "mul":
            value *= float(other[n, c, u, v])
        elif function == "gate":
            value *= float(other[n, c, 0, 0])
        elif function == "affine":
            value = value * float(scale[c]) + float(shift[c])
        out[n, c, u, v] = activate(value, activation)
    return out


def sparse_product(x, weights, offsets, stride, pixels):
    """Sum weighted runs of the line x: (R, pixels) from weights (steps, J, R).

    Column j of step s is the run of pixels that starts at ``offsets[s] + j * stride``.
    """
    steps, columns, rows = weights.shape
    out = np.zeros((rows, pixels))
    for r, p in np.ndindex(*out.shape):
        for s, j in np.ndindex(steps, columns):
            out[r, p] += float(weights[s, j, r]) * float(x[offsets[s] + j * stride + p])
    return out


POINTS = {6: (0, 0.5, -0.5, 1.5, -1.5), 8: (0, 0.5, -0.5, 1, -1, 2, -2)}
"""Where Winograd's F(m, r) evaluates polynomials, by the number of planes, m + r - 1.

Infinity, the leading coefficient, comes last.
"""


def winograd_weight(taps):
    """Turn 3, 5 or 7 taps into 6, 8 or 8 planes: their polynomial at every point.

    Each value is divided by the product of the point's distances to the others, which
    interpolation (Toom and Cook's, of which this is the transpose) asks for.
    """
    planes, points = [], POINTS[6 if len(taps) == 3 else 8]
    for point in points:
        value = sum(tap * point**power for power, tap in enumerate(taps))
        planes.append(value / prod(point - other for other in points if other != point))
    return [*planes, taps[-1]]


def winograd_input(rows):
    """Turn six or eight rows into as many planes.

    The plane of a point is the polynomial whose roots are the other points, with row k in the place
    of the k-th power; that of infinity has all points as roots.
    """
    planes, points = [], POINTS[len(rows)]
    for own in (*points, None):
        polynomial = [1]
        for root in points:
            if root != own:
                longer = zip([0, *polynomial], [*polynomial, 0], strict=True)
                polynomial = [shifted - root * same for shifted, same in longer]
        planes.append(sum(c * row for c, row in zip(polynomial, rows, strict=False) if c))
    return planes


def winograd_output(planes, outputs=4):
    """Turn planes into rows: row k is the sum of the planes times their points' powers."""
    rows = []
    for power in range(outputs):
        finite = zip(POINTS[len(planes)], planes[:-1], strict=True)
        row = sum(point**power * plane for point, plane in finite if point or power == 0)
        rows.append(row + planes[-1] if power == outputs - 1 else row)
    return rows


def _both_ways(transform, square):
    """Apply a transform to every column of a square of values, then to every row of the result."""
    down = [transform(list(column)) for column in zip(*square, strict=True)]
    return [transform(list(row)) for row in zip(*down, strict=True)]


def tile_weight(taps):
    """Turn 3 x 3 taps into 6 x 6 planes, [row][column]."""
    return _both_ways(winograd_weight, taps)


def tile_input(pixels):
    """Turn 6 x 6 pixels into 6 x 6 planes, [row][column]."""
    return _both_ways(winograd_input, pixels)


def tile_output(planes):
    """Turn 6 x 6 planes into 4 x 4 outputs, [row][column]."""
    return _both_ways(winograd_output, planes)

"""Pools: maximum and average over windows, and averages over an adaptive grid.

Windows are separable: rows are combined first, along contiguous pixels where the loop vectorises,
then columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import records as r
from .intrinsics import call, floats_at
from .loop import loop
from .views import opened, side, span, view, zero_beside, zero_ends


def fast_pool_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Pool one chunk of output rows, or of channels, with the micro-kernel."""
    memory, memory_at, step, _, batch = opened(call_at, step_at)
    b = view(step, r.TARGET)
    start, stop, first, last = span(step, item, b.channels, batch * b.height)
    line = first
    while line < last:
        n, y = line // b.height, line % b.height
        a, top, end = side(step, y, b.height, step[r.PAD_H])
        rows = min(end - y, last - line)
        call(
            step[r.FAST],
            (
                memory_at + 4 * (a.base + start * a.channel + n * a.image - step[r.PAD_W]),
                4 * a.row, 4 * a.channel,
                y * step[r.STRIDE_H] - top, a.height, step[r.STRIDE_H],
                memory_at + 4 * (b.base + start * b.channel + n * b.image + y * b.row), 4 * b.row,
                4 * b.channel,
                step[r.COLUMN_MASKS], step[r.WITHIN],
                step[r.DIVISORS] + 4 * y * step[r.ROW_VECTORS] * step[r.LANES],
                4 * step[r.ROW_VECTORS] * step[r.LANES], stop - start, rows, step[r.ROW_VECTORS],
            ),
        )  # fmt: skip
        zero_ends(memory, b, start, stop, n, y, rows, batch)
        line += rows


def pool_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Pool one chunk of output rows, or of channels, whatever the window."""
    memory, _, step, _, batch = opened(call_at, step_at)
    a, b = view(step, r.SOURCE), view(step, r.TARGET)
    kind, pad_w = step[r.KIND], step[r.PAD_W]
    kernel_h, kernel_w, stride_w = step[r.KERNEL_H], step[r.KERNEL_W], step[r.STRIDE_W]
    reach = (b.width - 1) * stride_w + (kernel_w - 1) * step[r.DILATION_W] + 1
    line = floats_at(scratch_at + r.HEADER, max(reach, pad_w + a.width))
    empty = np.float32(-np.inf) if kind == r.MAX_POOL else np.float32(0)
    line[:] = empty
    pixels = line[pad_w : pad_w + a.width]
    start, stop, first, last = span(step, item, b.channels, batch * b.height)
    for channel in range(start, stop):
        for index in range(first, last):
            n, y = index // b.height, index % b.height
            zero_beside(memory, b, channel, n, y, batch)
            a, above, _ = side(step, y, b.height, step[r.PAD_H])
            source = a.base + channel * a.channel + n * a.image
            target = b.base + channel * b.channel + n * b.image
            top = y * step[r.STRIDE_H] - above
            pixels[:] = empty
            for i in range(kernel_h):
                from_y = top + i * step[r.DILATION_H]
                if 0 <= from_y < a.height:
                    row = memory[source + from_y * a.row : source + from_y * a.row + a.width]
                    if kind == r.MAX_POOL:
                        for x in range(a.width):
                            # a NaN wins, as in PyTorch
                            if row[x] > pixels[x] or row[x] != row[x]:
                                pixels[x] = row[x]
                    else:
                        for x in range(a.width):
                            pixels[x] += row[x]
            out = memory[target + y * b.row : target + y * b.row + b.width]
            if kind == r.MAX_POOL:
                _max_columns(line, out, kernel_w, stride_w, step[r.DILATION_W])
            else:
                # rows and columns of the window, cut at the padded image or at the image
                bottom = top + kernel_h
                if step[r.COUNT_PAD]:
                    rows = min(bottom, a.height + step[r.PAD_H]) - top
                else:
                    rows = min(bottom, a.height) - max(top, 0)
                for x in range(b.width):
                    left = x * stride_w - pad_w
                    right = left + kernel_w
                    if step[r.COUNT_PAD]:
                        columns = min(right, a.width + pad_w) - left
                    else:
                        columns = min(right, a.width) - max(left, 0)
                    total = np.float32(0)
                    for j in range(kernel_w):
                        total += line[x * stride_w + j]
                    out[x] = total / np.float32(rows * columns)


@loop
def _max_columns(line: Any, out: Any, kernel: int, stride: int, dilation: int) -> None:
    for x in range(out.size):
        best = line[x * stride]
        for j in range(1, kernel):
            value = line[x * stride + j * dilation]
            if value > best or value != value:
                best = value
        out[x] = best


def mean_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Average one chunk of channels over whole images with the micro-kernel."""
    memory, memory_at, step, _, batch = opened(call_at, step_at)
    a, b, lower = view(step, r.SOURCE), view(step, r.TARGET), view(step, r.OTHER)
    start, stop, first, last = span(step, item, b.channels, batch)
    for n in range(first, last):
        call(
            step[r.FAST],
            (
                memory_at + 4 * (a.base + start * a.channel + n * a.image),
                4 * a.row, 4 * a.channel, a.height,
                memory_at + 4 * (lower.base + start * lower.channel),
                4 * lower.row, 4 * lower.channel, lower.height,
                memory_at + 4 * (b.base + start * b.channel + n * b.image), 4 * b.channel,
                step[r.COLUMN_MASKS], step[r.ROW_VECTORS], step[r.DIVISORS], stop - start,
            ),
        )  # fmt: skip
        zero_ends(memory, b, start, stop, n, 0, 1, batch)


def adaptive_pool_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Average one chunk of channels over an adaptive grid.

    Window i of h spans rows floor(i * H / h) to ceil((i + 1) * H / h), as in PyTorch. Of one image
    in halves the second operand is the lower one.
    """
    memory, _, step, _, batch = opened(call_at, step_at)
    a, b, lower = view(step, r.SOURCE), view(step, r.TARGET), view(step, r.OTHER)
    height = a.height + (lower.height if lower.base >= 0 else 0)
    start, stop, first, last = span(step, item, b.channels, batch * b.height)
    for channel in range(start, stop):
        for index in range(first, last):
            n, y = index // b.height, index % b.height
            zero_beside(memory, b, channel, n, y, batch)
            source = a.base + channel * a.channel + n * a.image
            beyond = lower.base + channel * lower.channel - a.height * lower.row
            target = b.base + channel * b.channel + n * b.image
            top, bottom = y * height // b.height, -(-(y + 1) * height // b.height)
            for x in range(b.width):
                left, right = x * a.width // b.width, -(-(x + 1) * a.width // b.width)
                total = 0.0  # double: a sum over a whole plane
                for i in range(top, bottom):
                    # of its own, so that the processor works on several rows at once
                    along = 0.0
                    at = source + i * a.row if i < a.height else beyond + i * lower.row
                    for j in range(left, right):
                        along += memory[at + j]
                    total += along
                memory[target + y * b.row + x] = total / ((bottom - top) * (right - left))

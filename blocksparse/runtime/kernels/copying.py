"""Copies that change shape or layout: input, output, slices, padding, flattening, phase planes.

One loop serves all: an output pixel (c, y, x) comes from the input pixel
``scale * (c, y, x) + shift``, or is zero where that lies outside.
"""

from __future__ import annotations

from . import call_record as c
from . import records as r
from .intrinsics import call, floats_at, integers_at
from .views import opened, side, span, view, zero_beside, zero_ends


def copy_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Copy one chunk of output rows, or of channels, or load the input, or store the output."""
    source, _, step, tables, batch = opened(call_at, step_at)
    target = source
    ends = integers_at(call_at, c.FIELDS)
    if step[r.OP] == r.LOAD:
        source = floats_at(integers_at(ends[c.INPUT_AT_AT], 1)[0], ends[c.INPUT_SIZE])
    if step[r.OP] == r.STORE:
        target = floats_at(integers_at(ends[c.OUTPUT_AT_AT], 1)[0], ends[c.OUTPUT_SIZE])
    a, b = view(step, r.SOURCE), view(step, r.TARGET)
    planes = step[r.PLANES]
    start, stop, first, last = span(step, item, b.channels, batch * b.height)
    for channel in range(start, stop):
        from_channel = channel // planes * step[r.SCALE] + step[r.SHIFT]
        at = step[r.PLANE_SHIFTS] + 2 * (channel % planes)
        shift_x = step[r.SHIFT + 2] + tables[at + 1]
        scale_y, scale_x = step[r.SCALE + 1], step[r.SCALE + 2]
        inside = 0 <= from_channel < a.channels
        # output columns whose input column exists
        low = min(b.width, max(0, -(shift_x // scale_x)))
        high = max(low, min(b.width, (a.width - 1 - shift_x) // scale_x + 1))
        for line in range(first, last):
            n, y = line // b.height, line % b.height
            zero_beside(target, b, channel, n, y, batch)
            row = b.base + channel * b.channel + n * b.image + y * b.row
            a, top, _ = side(step, y, b.height, -step[r.SHIFT + 1])
            from_y = y * scale_y - top + tables[at]
            if not inside or from_y < 0 or from_y >= a.height:
                target[row : row + b.width] = 0
                continue
            begin = a.base + from_channel * a.channel + n * a.image + from_y * a.row + shift_x
            target[row : row + low] = 0
            if scale_x == 1:
                # counted from zero: Numba knows that no index is negative, and makes vector code
                pixels = source[begin + low : begin + high]
                copies = target[row + low : row + high]
                for x in range(copies.size):
                    copies[x] = pixels[x]
            elif scale_x == 2:
                for x in range(low, high):
                    target[row + x] = source[begin + 2 * x]
            else:
                for x in range(low, high):
                    target[row + x] = source[begin + scale_x * x]
            target[row + high : row + b.width] = 0


def phases_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Split one chunk of rows, or of channels, into phase planes, for column stride 2."""
    memory, memory_at, step, tables, batch = opened(call_at, step_at)
    a, b = view(step, r.SOURCE), view(step, r.TARGET)
    channels = a.channels
    planes, scale = step[r.PLANES], step[r.SCALE + 1]
    # an item of channels has all planes of its input channels
    start, stop, first, last = span(step, item, channels, batch * b.height)
    line = first
    while line < last:
        n, y = line // b.height, line % b.height
        a, top, height = side(step, y, b.height, -step[r.SHIFT + 1])
        rows = min(height - y, last - line)
        source = a.base + start * a.channel + n * a.image + step[r.SHIFT + 2]
        plane = 0
        while plane < planes:
            at = step[r.PLANE_SHIFTS] + 2 * plane
            pair = plane + 1 < planes and tables[at + 3] == 1  # the odd columns come next
            at_channel = b.base + (start * planes + plane) * b.channel
            even = memory_at + 4 * (at_channel + n * b.image + y * b.row)
            call(
                step[r.FAST],
                (
                    memory_at + 4 * source, 4 * a.row, 4 * a.channel,
                    y * scale - top + tables[at], a.height, scale,
                    even, even + 4 * b.channel if pair else 0, 4 * b.row, 4 * b.channel * planes,
                    step[r.COLUMN_MASKS], step[r.WITHIN], stop - start, rows, step[r.ROW_VECTORS],
                ),
            )  # fmt: skip
            plane += 2 if pair else 1
        zero_ends(memory, b, start * planes, stop * planes, n, y, rows, batch)
        line += rows

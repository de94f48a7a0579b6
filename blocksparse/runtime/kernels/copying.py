"""Copies that change shape or layout: input, output, slices, padding, flattening, phase planes.

One loop serves all: an output pixel (c, y, x) comes from the input pixel
``scale * (c, y, x) + shift``, or is zero where that lies outside.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from . import records as r
from .records import view, zero_around


@njit(cache=True, nogil=True)
def copy_item(source: Any, target: Any, step: Any, tables: Any, item: int, batch: int) -> None:
    """Copy one chunk of output channels."""
    a, b = view(step, r.SOURCE), view(step, r.TARGET)
    planes = step[r.PLANES]
    for channel in range(item * step[r.CHUNK], min(b.channels, (item + 1) * step[r.CHUNK])):
        from_channel = channel // planes * step[r.SCALE] + step[r.SHIFT]
        at = step[r.PLANE_SHIFTS] + 2 * (channel % planes)
        shift_y = step[r.SHIFT + 1] + tables[at]
        shift_x = step[r.SHIFT + 2] + tables[at + 1]
        scale_y, scale_x = step[r.SCALE + 1], step[r.SCALE + 2]
        inside = 0 <= from_channel < a.channels
        # output columns whose input column exists
        low = min(b.width, max(0, -(shift_x // scale_x)))
        high = max(low, min(b.width, (a.width - 1 - shift_x) // scale_x + 1))
        for n in range(batch):
            for y in range(b.height):
                row = b.base + channel * b.channel + n * b.image + y * b.row
                from_y = y * scale_y + shift_y
                if not inside or from_y < 0 or from_y >= a.height:
                    target[row : row + b.width] = 0
                    continue
                start = a.base + from_channel * a.channel + n * a.image + from_y * a.row + shift_x
                target[row : row + low] = 0
                if scale_x == 1:
                    for x in range(low, high):
                        target[row + x] = source[start + x]
                elif scale_x == 2:
                    for x in range(low, high):
                        target[row + x] = source[start + 2 * x]
                else:
                    for x in range(low, high):
                        target[row + x] = source[start + scale_x * x]
                target[row + high : row + b.width] = 0
        zero_around(target, b, channel, batch)

"""Convolutions of kernel height 1 and width 3, 5 or 7 through Winograd's F(m, r) along the rows.

A channel is one line of pixels (see `lines`), on which the convolution is one of a single
dimension: of m * r multiplications n remain. A work item is a band of units and one part of the row
tiles; the planes of a band are scratch memory of the thread.
"""

from __future__ import annotations

from . import records as r
from .intrinsics import call, load_acquire, store
from .views import opened, run_of, view, zero_margins
from .winograd import products


def lines_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Compute one band of units for one part of the output channels; see `loops.ITEMS`."""
    memory, memory_at, step, tables, batch = opened(call_at, step_at)
    a, b, other = view(step, r.SOURCE), view(step, r.TARGET), view(step, r.OTHER)
    band, part = item // step[r.PARTS_COUNT], item % step[r.PARTS_COUNT]
    first = band * step[r.BAND]
    last = min(step[r.TILE_ROWS_ALL], first + step[r.BAND])
    lanes, width = step[r.LANES], step[r.OUTPUTS]
    start = first * width * lanes
    tag = (tag << 32) + band
    x = scratch_at + r.HEADER
    if load_acquire(scratch_at) != tag:
        call(
            step[r.INPUT_KERNEL],
            (
                memory_at + 4 * (a.base + start - step[r.PAD_LEFT]), 4 * a.channel, x,
                4 * step[r.PLANE], 4 * step[r.PLANE_CHANNEL], a.channels, last - first,
            ),
        )  # fmt: skip
        store(scratch_at, tag)
    sums = x + 4 * step[r.PLANES_ALL] * step[r.PLANE]
    vectors = -(-run_of(b, batch) // lanes)
    for tile in range(tables[step[r.PARTS] + part], tables[step[r.PARTS] + part + 1]):
        at = step[r.TILES] + tile * r.TILE_FIELDS
        k, channels = tables[at + r.TILE_FIRST], tables[at + r.TILE_ROWS]
        products(step, tables, at, x, last - first, sums, 0, 0, 0)
        beside = other.base + k * other.channel + start
        call(
            step[r.OUTPUT_KERNEL],
            (
                sums, 4 * step[r.SUMS_PLANE], 4 * step[r.SUMS_ROW],
                memory_at + 4 * (b.base + k * b.channel + start), 4 * b.channel,
                memory_at + 4 * beside if other.base >= 0 else 0, 4 * other.channel,
                step[r.BIAS] + 4 * k, step[r.INSIDE] + first * width * max(1, lanes // 8),
                vectors - first * width, step[r.BOUNDS], channels, last - first,
            ),
        )  # fmt: skip
        ends = last == step[r.TILE_ROWS_ALL]
        zero_margins(memory, b, k, k + channels, batch, first == 0, ends)

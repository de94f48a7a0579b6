"""Convolutions of kernel size 3 x 3 through Winograd's F(4x4, 3x3).

A tile of 4 x 4 outputs is computed from 6 x 6 inputs with 36 products a block in place of 144. The
vectors of a *unit* hold as many tiles as they have lanes (see `tiles`). A work item is a band of
units and one part of the row tiles; the planes of a band are scratch memory of the thread.
"""

from __future__ import annotations

from typing import Any

from . import records as r
from .intrinsics import call, load_acquire, store
from .loop import loop
from .views import opened, view, zero_ends
from .winograd_matrices import OUTPUTS, PLANES


def tiles_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Compute one band of units for one part of the output channels; see `loops.ITEMS`."""
    memory, memory_at, step, tables, batch = opened(call_at, step_at)
    band, part = item // step[r.PARTS_COUNT], item % step[r.PARTS_COUNT]
    first = band * step[r.BAND]
    last = min(step[r.TILE_ROWS_ALL], first + step[r.BAND])
    tag = (tag << 32) + band
    vector = 4 * step[r.LANES]
    planes = scratch_at + r.HEADER
    if load_acquire(scratch_at) != tag:
        for unit in range(first, last):
            _planes(memory_at, step, unit, planes + (unit - first) * vector)
        store(scratch_at, tag)
    sums = planes + 4 * PLANES * PLANES * step[r.PLANE]
    start, end = tables[step[r.PARTS] + part], tables[step[r.PARTS] + part + 1]
    while start < end:
        stop = min(end, start + step[r.TOGETHER])
        for unit in range(first, last, r.UNITS):
            width = min(r.UNITS, last - unit)
            _products(step, tables, start, stop, planes + (unit - first) * vector, width, sums)
            for one in range(width):
                _outputs(
                    memory, memory_at, step, tables, start, stop, unit + one, sums + one * vector,
                    batch,
                )  # fmt: skip
        start = stop


@loop
def _products(
    step: Any, tables: Any, start: int, stop: int, planes: int, width: int, sums: int
) -> None:
    """Multiply the planes of up to `UNITS` units by the weights of some row tiles.

    One row tile takes all planes in one call. Several take a plane after the other, so that the
    first-level cache holds its inputs for all of them.
    """
    at_once = PLANES * PLANES if stop - start == 1 else 1
    for plane in range(0, PLANES * PLANES, at_once):
        for tile in range(start, stop):
            at = step[r.TILES] + tile * r.TILE_FIELDS
            count = tables[at + r.TILE_COUNT]
            weights = count * step[r.STEP_BYTES]  # of one plane
            place = (tile - start) * PLANES * PLANES + plane
            call(
                step[r.KERNELS + width - 1],
                (
                    planes + 4 * plane * step[r.PLANE],
                    tables[at + r.TILE_VALUES] + plane * weights,
                    tables[at + r.TILE_OFFSETS], count, 4 * step[r.PLANE_CHANNEL],
                    sums + 4 * place * step[r.SUMS_PLANE], 4 * step[r.SUMS_ROW], at_once,
                    4 * step[r.PLANE], weights, 4 * step[r.SUMS_PLANE], 0, 0, 0,
                ),
            )  # fmt: skip


@loop
def _place(step: Any, unit: int) -> tuple[int, int, int]:
    """Image, first output row and vector along the row of a unit."""
    along = step[r.UNITS_ROW]
    n, within = unit // step[r.TILE_ROWS_IMAGE], unit % step[r.TILE_ROWS_IMAGE]
    return n, within // along * OUTPUTS * step[r.GROUPS], within % along


@loop
def _planes(memory_at: int, step: Any, unit: int, planes: int) -> None:
    a = view(step, r.SOURCE)
    n, y, v = _place(step, unit)
    column = v * OUTPUTS * step[r.LANES] - step[r.PAD_LEFT]
    call(
        step[r.INPUT_KERNEL],
        (
            memory_at + 4 * (a.base + n * a.image + column), 4 * a.row, 4 * a.channel,
            y - step[r.PAD_TOP], a.height, step[r.ZEROS],
            step[r.INSIDE] + v * 2 * OUTPUTS * max(1, step[r.LANES] // 8),
            planes, 4 * step[r.PLANE], 4 * step[r.PLANE_CHANNEL], a.channels,
        ),
    )  # fmt: skip


@loop
def _outputs(
    memory: Any, memory_at: int, step: Any, tables: Any, start: int, stop: int, unit: int,
    sums: int, batch: int,
) -> None:  # fmt: skip
    """Transform the sums of some row tiles back, for one unit."""
    b, other = view(step, r.TARGET), view(step, r.OTHER)
    n, y, v = _place(step, unit)
    y //= step[r.WINDOW]
    size = OUTPUTS // step[r.WINDOW]  # of a tile
    rows = min(size * step[r.GROUPS], b.height - y)
    if rows <= 0:  # the last row of an odd number is in no window
        return
    column = v * size * step[r.LANES]
    covered = step[r.UNITS_ROW] * size * step[r.LANES] // step[r.GROUPS]
    for tile in range(start, stop):
        at = step[r.TILES] + tile * r.TILE_FIELDS
        k, channels = tables[at + r.TILE_FIRST], tables[at + r.TILE_ROWS]
        residual = 0
        if other.base >= 0:
            beside = other.base + k * other.channel + n * other.image + y * other.row + column
            residual = memory_at + 4 * beside
        to = b.base + k * b.channel + n * b.image + y * b.row + column
        call(
            step[r.OUTPUT_KERNEL],
            (
                sums + 4 * (tile - start) * PLANES * PLANES * step[r.SUMS_PLANE],
                4 * step[r.SUMS_PLANE], 4 * step[r.SUMS_ROW],
                memory_at + 4 * to, 4 * b.row, 4 * b.channel,
                residual, 4 * other.row, 4 * other.channel, step[r.BIAS] + 4 * k,
                step[r.WITHIN] + v * 2 * size * max(1, step[r.LANES] // 8), rows,
                step[r.BOUNDS], channels,
            ),
        )  # fmt: skip
        if v == step[r.UNITS_ROW] - 1:
            if covered < b.row:  # the padding columns lie beyond the last tile
                for channel in range(k, k + channels):
                    for line in range(y, y + rows):
                        pixels = b.base + channel * b.channel + n * b.image + line * b.row
                        memory[pixels + covered : pixels + b.row] = 0
            zero_ends(memory, b, k, k + channels, n, y, rows, batch)

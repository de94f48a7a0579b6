"""Convolutions of kernel height 3, 4, 5 or 7 through Winograd's F(m, r) along image columns.

A tile row is m rows of outputs, computed from n rows of inputs. The input transform turns these
into n planes; on each, the convolution is one of kernel height 1; the output transform adds the
planes up to the m rows. So of m * r multiplications n remain: 6 of 12, 8 of 20, 8 of 20, 8 of 14.
Rows stay as they are, vectors run along them, so kernel width and padding need nothing new. Nor do
strides: a 7x7 convolution of stride 2 is one of up to 4x4 taps on four times as many channels, the
phase planes of its input.

A work item is a band of tile rows and one part of the row tiles. The planes of a band are scratch
memory of the thread and stay in its second-level cache; a thread that takes another part of the
same band finds them there.
"""

from __future__ import annotations

from typing import Any

from . import records as r
from .convolution import tiles_of
from .intrinsics import call, load_acquire, store
from .loop import loop
from .views import opened, view, zero_ends


def winograd_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Compute one band of tile rows for one part of the output channels; see `loops.ITEMS`."""
    memory, memory_at, step, tables, batch = opened(call_at, step_at)
    b = view(step, r.TARGET)
    band, part = item // step[r.PARTS_COUNT], item % step[r.PARTS_COUNT]
    first = band * step[r.BAND]
    last = min(step[r.TILE_ROWS_ALL], first + step[r.BAND])
    tag = (tag << 32) + band
    if load_acquire(scratch_at) != tag:
        _planes(memory_at, step, first, last, scratch_at + r.HEADER)
        store(scratch_at, tag)
    x = scratch_at + r.HEADER + 4 * step[r.LEAD]
    sums = scratch_at + r.HEADER + 4 * step[r.PLANES_ALL] * step[r.PLANE]
    vectors = -(-(last - first) * b.row // step[r.LANES])
    n, y = first // step[r.TILE_ROWS_IMAGE], first % step[r.TILE_ROWS_IMAGE] * step[r.OUTPUTS]
    outputs = memory_at + 4 * (b.base + n * b.image + y * b.row)
    for tile in range(tables[step[r.PARTS] + part], tables[step[r.PARTS] + part + 1]):
        at = step[r.TILES] + tile * r.TILE_FIELDS
        ask = outputs + 4 * tables[at + r.TILE_FIRST] * b.channel
        products(step, tables, at, x, vectors, sums, ask, 4 * b.channel, step[r.OUTPUTS])
        for t in range(first, last):
            _outputs(
                memory, memory_at, step, t, tables[at + r.TILE_FIRST], tables[at + r.TILE_ROWS],
                sums + 4 * (t - first) * b.row, batch,
            )  # fmt: skip


@loop
def products(
    step: Any, tables: Any, at: int, x: int, vectors: int, sums: int, ask: int, ask_stride: int,
    asked: int,
) -> None:  # fmt: skip
    """Multiply all planes of a band, so many vectors each, by the weights of one row tile.

    The first `asked` planes ask for as many pixels of the outputs each, from address `ask` on: the
    rows of a band are one piece of a channel.
    """
    count = tables[at + r.TILE_COUNT]
    for plane in range(step[r.PLANES_ALL]):
        values = tables[at + r.TILE_VALUES] + plane * count * step[r.STEP_BYTES]
        v = 0
        while v < vectors:
            width, many = tiles_of(step, vectors - v)
            shift, across = 4 * v * step[r.LANES], 4 * width * step[r.LANES]
            call(
                step[r.KERNELS + width - 1],
                (
                    x + 4 * plane * step[r.PLANE] + shift, values, tables[at + r.TILE_OFFSETS],
                    count, 4 * step[r.BLOCK_CHANNEL],
                    sums + 4 * plane * step[r.SUMS_PLANE] + shift, 4 * step[r.SUMS_ROW],
                    many, across, 0, across,
                    ask + 4 * plane * vectors * step[r.LANES] + shift, ask_stride,
                    many if plane < asked else 0,
                ),
            )  # fmt: skip
            v += width * many


@loop
def _planes(memory_at: int, step: Any, first: int, last: int, planes: int) -> None:
    """Transform the input rows of a band."""
    a = view(step, r.SOURCE)
    lanes = step[r.LANES]
    for t in range(first, last):
        n, top = t // step[r.TILE_ROWS_IMAGE], t % step[r.TILE_ROWS_IMAGE] * step[r.OUTPUTS]
        call(
            step[r.INPUT_KERNEL],
            (
                memory_at + 4 * (a.base + n * a.image), 4 * a.row, 4 * a.channel,
                top - step[r.PAD_TOP], a.height, step[r.ZEROS],
                planes + 4 * (step[r.LEAD] + (t - first) * a.row), 4 * step[r.PLANE],
                4 * step[r.PLANE_CHANNEL], 1 if t == first and step[r.LEAD] else 0,
                a.channels, -(-a.row // lanes),
            ),
        )  # fmt: skip


@loop
def _outputs(
    memory: Any, memory_at: int, step: Any, t: int, k: int, channels: int, sums: int, batch: int
) -> None:
    """Transform the sums of one tile row and zero the padding around the rows."""
    b, other = view(step, r.TARGET), view(step, r.OTHER)
    n, y = t // step[r.TILE_ROWS_IMAGE], t % step[r.TILE_ROWS_IMAGE] * step[r.OUTPUTS]
    rows = min(step[r.OUTPUTS], b.height - y)
    residual = 0
    if other.base >= 0:
        at = other.base + k * other.channel + n * other.image + y * other.row
        residual = memory_at + 4 * at
    start = b.base + k * b.channel
    call(
        step[r.OUTPUT_KERNEL],
        (
            sums, 4 * step[r.SUMS_PLANE], 4 * step[r.SUMS_ROW],
            memory_at + 4 * (start + n * b.image + y * b.row), 4 * b.row, 4 * b.channel,
            residual, 4 * other.row, 4 * other.channel, step[r.BIAS] + 4 * k, step[r.INSIDE],
            step[r.WITHIN], rows, step[r.BOUNDS], channels, -(-b.row // step[r.LANES]),
        ),
    )  # fmt: skip
    zero_ends(memory, b, k, k + channels, n, y, rows, batch)

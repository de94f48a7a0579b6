"""Convolutions: the loops around the pixel micro-kernels.

A work item is one panel of pixels and one part of the row tiles. A panel is narrow enough for its
input to stay in the second-level cache while the part's weights stream past it; parts hold about
equally many nonzeros.
"""

from __future__ import annotations

from typing import Any

from . import records as r
from .intrinsics import call
from .loop import loop
from .views import opened, view, zero_margins


@loop
def tiles_of(step: Any, left: int) -> tuple[int, int]:
    """Vectors of the next register tiles when `left` vectors remain, and how many such tiles."""
    if step[r.WIDEST] == r.DOUBLING:
        width = 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
        return width, left // width
    # as few tiles as will do, about equally wide: 2 + 2 rather than 3 + 1
    tiles = -(-left // step[r.WIDEST])
    wider = left % tiles
    return (left // tiles + 1, wider) if wider else (left // tiles, tiles)


@loop
def kernel_of(step: Any, width: int) -> int:
    """Address of the micro-kernel of a width."""
    if step[r.WIDEST] == r.DOUBLING:
        return step[r.KERNELS + (3 if width == 8 else width // 2)]
    return step[r.KERNELS + width - 1]


def conv_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Compute one panel of pixels for one part of the output channels."""
    memory, memory_at, step, tables, batch = opened(call_at, step_at)
    a, b, other = view(step, r.SOURCE), view(step, r.TARGET), view(step, r.OTHER)
    panel, part = item // step[r.PARTS_COUNT], item % step[r.PARTS_COUNT]
    first = panel * step[r.PANEL]
    last = min(step[r.VECTORS], first + step[r.PANEL])
    lanes = step[r.LANES]
    mask_bytes = max(1, lanes // 8)
    for tile in range(tables[step[r.PARTS] + part], tables[step[r.PARTS] + part + 1]):
        at = step[r.TILES] + tile * r.TILE_FIELDS
        k, rows = tables[at + r.TILE_FIRST], tables[at + r.TILE_ROWS]
        values, offsets, count = (
            tables[at + r.TILE_VALUES],
            tables[at + r.TILE_OFFSETS],
            tables[at + r.TILE_COUNT],
        )
        bias = step[r.BIAS] + 4 * k
        y = memory_at + 4 * (b.base + k * b.channel)
        x = memory_at + 4 * a.base
        residual = memory_at + 4 * (other.base + k * other.channel) if other.base >= 0 else 0
        v = first
        while v < last:
            width, many = tiles_of(step, last - v)
            shift = 4 * v * lanes
            beside = residual + shift if residual else 0
            mask = step[r.MASK] + v * mask_bytes
            if step[r.OP] == r.CONV_NM:
                call(
                    kernel_of(step, width),
                    (
                        x + shift, values, tables[at + r.TILE_INDICES], offsets, count,
                        4 * a.channel, y + shift, 4 * b.channel, bias, beside, 4 * other.channel,
                        mask, rows, step[r.BOUNDS], many,
                    ),
                )  # fmt: skip
            else:
                call(
                    kernel_of(step, width),
                    (
                        x + shift, values, offsets, count,
                        4 * a.channel, y + shift, 4 * b.channel, bias, beside, 4 * other.channel,
                        mask, rows, step[r.BOUNDS], many, tables[at + r.TILE_NEXT],
                    ),
                )  # fmt: skip
            v += width * many
        if last == step[r.VECTORS] and step[r.TAIL] != 0:
            shift = 4 * last * lanes
            call(
                step[r.TAIL],
                (
                    x + shift, values, offsets, count,
                    4 * a.channel, y + shift, 4 * b.channel, bias,
                    residual + shift if residual else 0, 4 * other.channel,
                    rows, step[r.BOUNDS], tables[at + r.TILE_NEXT],
                ),
            )  # fmt: skip
        zero_margins(memory, b, k, k + rows, batch, first == 0, last == step[r.VECTORS])

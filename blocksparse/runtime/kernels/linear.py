"""Linear layers: the loops around the micro-kernels over output features."""

from __future__ import annotations

from . import records as r
from .intrinsics import call
from .views import opened, view


def linear_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Compute one part of the output features for all images."""
    _, memory_at, step, tables, batch = opened(call_at, step_at)
    a, b = view(step, r.SOURCE), view(step, r.TARGET)
    for tile in range(tables[step[r.PARTS] + item], tables[step[r.PARTS] + item + 1]):
        at = step[r.TILES] + tile * r.TILE_FIELDS
        k, rows = tables[at + r.TILE_FIRST], tables[at + r.TILE_ROWS]
        values, offsets, count = (
            tables[at + r.TILE_VALUES],
            tables[at + r.TILE_OFFSETS],
            tables[at + r.TILE_COUNT],
        )
        bias = step[r.BIAS] + 4 * k
        n = 0
        while n < batch:
            left = batch - n
            width = 4 if left >= 4 else 2 if left >= 2 else 1
            kernel = step[r.KERNELS + width // 2]
            x = memory_at + 4 * (a.base + n * a.image)
            y = memory_at + 4 * (b.base + n * b.image + k)
            if step[r.OP] == r.LINEAR_NM:
                call(
                    kernel,
                    (
                        x, 4 * a.image, values, tables[at + r.TILE_INDICES], offsets, count,
                        y, 4 * b.image, bias, rows, step[r.BOUNDS],
                    ),
                )  # fmt: skip
            else:
                call(
                    kernel,
                    (
                        x,
                        4 * a.image,
                        values,
                        offsets,
                        count,
                        y,
                        4 * b.image,
                        bias,
                        rows,
                        step[r.BOUNDS],
                    ),
                )
            n += width

"""Linear layers: the loops around the micro-kernels over output features."""

from __future__ import annotations

from typing import Any

from numba import njit

from .intrinsics import call
from .views import (
    BIAS, BOUNDS, KERNELS, LINEAR_NM, OP, PARTS, SOURCE, TARGET, TILE_COUNT, TILE_FIELDS, TILE_FIRST, TILE_INDICES,
    TILE_OFFSETS, TILE_ROWS, TILE_VALUES, TILES, view,
)  # fmt: skip


@njit(cache=True, nogil=True)
def linear_item(memory_at: int, step: Any, tables: Any, item: int, batch: int) -> None:
    """Compute one part of the output features for all images."""
    a, b = view(step, SOURCE), view(step, TARGET)
    for tile in range(tables[step[PARTS] + item], tables[step[PARTS] + item + 1]):
        at = step[TILES] + tile * TILE_FIELDS
        k, rows = tables[at + TILE_FIRST], tables[at + TILE_ROWS]
        values, offsets, count = (
            tables[at + TILE_VALUES],
            tables[at + TILE_OFFSETS],
            tables[at + TILE_COUNT],
        )
        bias = step[BIAS] + 4 * k
        n = 0
        while n < batch:
            left = batch - n
            width = 4 if left >= 4 else 2 if left >= 2 else 1
            kernel = step[KERNELS + width // 2]
            x = memory_at + 4 * (a.base + n * a.image)
            y = memory_at + 4 * (b.base + n * b.image + k)
            if step[OP] == LINEAR_NM:
                call(
                    kernel,
                    (
                        x, 4 * a.image, values, tables[at + TILE_INDICES], offsets, count, y, 4 * b.image, bias, rows,
                        step[BOUNDS],
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
                        step[BOUNDS],
                    ),
                )
            n += width

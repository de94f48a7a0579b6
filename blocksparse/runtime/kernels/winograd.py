"""Convolutions of kernel height 3 through Winograd's F(4, 3) along image columns.

A tile row is four rows of outputs, computed from six rows of inputs. The input transform turns
these into six planes; on each, the convolution is one of kernel height 1, with half the
multiplications in all; the output transform adds the planes up to the four rows. Rows stay as they
are, vectors run along them, so kernel width and padding need nothing new.

A work item is a band of tile rows and one part of the row tiles. The planes of a band are scratch
memory of the thread and stay in its second-level cache; a thread that takes another part of the
same band finds them there.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from . import records as r
from .convolution import width_of
from .intrinsics import call, load_acquire, store
from .records import view
from .winograd_matrices import OUTPUTS, PLANES

HEADER = 64
"""Bytes at the start of the scratch memory: which band of which step its planes hold."""


@njit(cache=True, nogil=True)
def winograd_item(
    memory: Any, memory_at: int, step: Any, tables: Any, item: int, batch: int, scratch_at: int,
    tag: int,
) -> None:  # fmt: skip
    """Compute one band of tile rows for one part of the output channels.

    Parameters
    ----------
    scratch_at : int
        Address of this thread's scratch memory.
    tag : int
        Number of the step in this call.
    """
    b = view(step, r.TARGET)
    band, part = item // step[r.PARTS_COUNT], item % step[r.PARTS_COUNT]
    first = band * step[r.BAND]
    last = min(step[r.TILE_ROWS_ALL], first + step[r.BAND])
    tag = (tag << 32) + band
    if load_acquire(scratch_at) != tag:
        _planes(memory_at, step, first, last, scratch_at + HEADER)
        store(scratch_at, tag)
    x = scratch_at + HEADER + 4 * step[r.LANES]  # before it, the zeros left of the first row
    sums = scratch_at + HEADER + 4 * PLANES * step[r.PLANE]
    vectors = -(-(last - first) * b.row // step[r.LANES])
    for tile in range(tables[step[r.PARTS] + part], tables[step[r.PARTS] + part + 1]):
        at = step[r.TILES] + tile * r.TILE_FIELDS
        count = tables[at + r.TILE_COUNT]
        for plane in range(PLANES):
            values = tables[at + r.TILE_VALUES] + plane * count * step[r.STEP_BYTES]
            v = 0
            while v < vectors:
                width = width_of(step, vectors - v)
                shift = 4 * v * step[r.LANES]
                call(
                    step[r.KERNELS + width - 1],
                    (
                        x + 4 * plane * step[r.PLANE] + shift, values,
                        tables[at + r.TILE_OFFSETS], count, 4 * step[r.PLANE_CHANNEL],
                        sums + 4 * plane * step[r.SUMS_PLANE] + shift, 4 * step[r.SUMS_ROW],
                    ),
                )  # fmt: skip
                v += width
        k = tables[at + r.TILE_FIRST]
        for channel in range(k, k + tables[at + r.TILE_ROWS]):
            _outputs(
                memory, memory_at, step, first, last, channel,
                sums + 4 * (channel - k) * step[r.SUMS_ROW], batch,
            )  # fmt: skip


@njit(cache=True, nogil=True)
def _planes(memory_at: int, step: Any, first: int, last: int, planes: int) -> None:
    """Transform the input rows of a band."""
    a = view(step, r.SOURCE)
    per_image, lanes = step[r.TILE_ROWS_IMAGE], step[r.LANES]
    vectors = -(-a.row // lanes)
    for channel in range(a.channels):
        y = planes + 4 * channel * step[r.PLANE_CHANNEL]
        for plane in range(PLANES):  # left padding of the first row
            for i in range(0, lanes, 2):
                store(y + 4 * plane * step[r.PLANE] + 4 * i, 0)
        for t in range(first, last):
            image = memory_at + 4 * (a.base + channel * a.channel + t // per_image * a.image)
            top = t % per_image * OUTPUTS - step[r.PAD_TOP]
            zeros = step[r.ZEROS]
            row = image + 4 * top * a.row
            call(
                step[r.INPUT_KERNEL],
                (
                    row if 0 <= top < a.height else zeros,
                    row + 4 * a.row if 0 <= top + 1 < a.height else zeros,
                    row + 8 * a.row if 0 <= top + 2 < a.height else zeros,
                    row + 12 * a.row if 0 <= top + 3 < a.height else zeros,
                    row + 16 * a.row if 0 <= top + 4 < a.height else zeros,
                    row + 20 * a.row if 0 <= top + 5 < a.height else zeros,
                    y + 4 * lanes + 4 * (t - first) * a.row,
                    4 * step[r.PLANE],
                    vectors,
                ),
            )


@njit(cache=True, nogil=True)
def _outputs(
    memory: Any, memory_at: int, step: Any, first: int, last: int, channel: int, sums: int,
    batch: int,
) -> None:  # fmt: skip
    """Transform the planes of one output channel and zero the padding around its rows."""
    b, other = view(step, r.TARGET), view(step, r.OTHER)
    per_image = step[r.TILE_ROWS_IMAGE]
    vectors = -(-b.row // step[r.LANES])
    start = b.base + channel * b.channel
    for t in range(first, last):
        n, y = t // per_image, t % per_image * OUTPUTS
        rows = min(OUTPUTS, b.height - y)
        residual = 0
        if other.base >= 0:
            residual = memory_at + 4 * (
                other.base + channel * other.channel + n * other.image + y * other.row
            )
        image = start + n * b.image
        call(
            step[r.OUTPUT_KERNEL],
            (
                sums + 4 * (t - first) * b.row, 4 * step[r.SUMS_PLANE],
                memory_at + 4 * (image + y * b.row), 4 * b.row, residual, 4 * other.row,
                step[r.BIAS] + 4 * channel, step[r.INSIDE], step[r.WITHIN], rows, step[r.BOUNDS],
                vectors,
            ),
        )  # fmt: skip
        if t == 0:
            memory[start - b.margin : start] = 0
        if y + rows == b.height:
            below = image + b.height * b.row
            if n < batch - 1:
                memory[below : image + b.image] = 0
            else:
                memory[below : below + b.margin] = 0

"""What the loops read from records: where values lie. And the zeros kept beside them."""

from __future__ import annotations

from typing import Any

from . import call_record as c
from . import records as r
from .intrinsics import floats_at, integers_at
from .loop import loop


@loop
def opened(call_at: int, step_at: int) -> Any:
    """View what an item of a step works on.

    Parameters
    ----------
    call_at : int
        Address of the call's record, see `call_record`.
    step_at : int
        Address of the step's, see `records`.

    Returns
    -------
    tuple
        The memory of all values, its address, the step's record, the tables, the batch size.
    """
    call = integers_at(call_at, c.FIELDS)
    memory = floats_at(call[c.MEMORY_AT], call[c.MEMORY_SIZE])
    tables = integers_at(call[c.TABLES_AT], call[c.TABLES_SIZE])
    step = integers_at(step_at, r.FIELDS)
    return memory, call[c.MEMORY_AT], step, tables, call[c.BATCH]


@loop
def view(step: Any, at: int) -> r.Layout:
    """Read a layout from a step's record."""
    return r.Layout(
        step[at], step[at + 1], step[at + 2], step[at + 3],
        step[at + 4], step[at + 5], step[at + 6], step[at + 7],
    )  # fmt: skip


@loop
def span(step: Any, item: int, channels: int, lines: int) -> tuple[int, int, int, int]:
    """First and last channel, first and last line of a work item; the last are excluded."""
    first = item * step[r.CHUNK]
    if step[r.BY_CHANNELS]:
        return first, min(channels, first + step[r.CHUNK]), 0, lines
    return 0, channels, first, min(lines, first + step[r.CHUNK])


@loop
def side(step: Any, y: int, height: int, top: int) -> tuple[r.Layout, int, int]:
    """Find what an output row of a copy or pool reads, where the input may be in halves.

    Returns
    -------
    source : Layout
        The input, or that half.
    top : int
        Row 0 of the outputs would begin so many rows above it.
    end : int
        Output row behind the last that reads the same.
    """
    split = step[r.SPLIT]
    if y < split:
        return view(step, r.SOURCE), top, split
    if split > 0:
        return view(step, r.OTHER), step[r.LOWER_TOP], height
    return view(step, r.SOURCE), top, height


@loop
def run_of(where: r.Layout, batch: int) -> int:
    """Pixels of a channel, as `Layout.run`."""
    return (batch - 1) * where.image + (where.height - 1) * where.row + where.width


@loop
def zero_margins(
    memory: Any, to: r.Layout, first: int, last: int, batch: int, before: bool, behind: bool
) -> None:
    """Zero what lies before and behind the pixels of channels that were written as one run."""
    run = run_of(to, batch)
    for channel in range(first, last):
        start = to.base + channel * to.channel
        if before:
            memory[start - to.margin : start] = 0
        if behind:
            memory[start + run : start + run + to.margin] = 0


@loop
def zero_beside(memory: Any, to: r.Layout, channel: int, n: int, y: int, batch: int) -> None:
    """Zero what lies beside row y of image n and that a convolution could read as padding.

    That is everything up to the next row or image, and the margins at both ends of a channel.
    """
    if to.margin < 0:
        return
    start = to.base + channel * to.channel
    if n == 0 and y == 0:
        memory[start - to.margin : start] = 0
    end = start + n * to.image + y * to.row + to.width
    if y < to.height - 1:
        memory[end : end + to.row - to.width] = 0
    elif n < batch - 1:
        memory[end : start + (n + 1) * to.image] = 0
    else:
        memory[end : end + to.margin] = 0


@loop
def zero_ends(
    memory: Any, to: r.Layout, first: int, last: int, n: int, y: int, rows: int, batch: int
) -> None:
    """Do `zero_beside` for channels whose rows were written whole, padding columns included.

    Only the first and the last row of an image have anything else beside them.
    """
    if y != 0 and y + rows != to.height:
        return
    for channel in range(first, last):
        if y == 0:
            zero_beside(memory, to, channel, n, 0, batch)
        if y + rows == to.height:
            zero_beside(memory, to, channel, n, to.height - 1, batch)

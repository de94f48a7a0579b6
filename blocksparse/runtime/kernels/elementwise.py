"""Element-wise operations that no product could take in: the loop around their micro-kernel."""

from __future__ import annotations

from . import records as r
from .intrinsics import call
from .views import opened, span, view, zero_beside


def elementwise_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Compute one chunk of vectors of all channels, or of channels, in place or not.

    All images are one run of vectors, or each has its own.
    """
    memory, memory_at, step, _, batch = opened(call_at, step_at)
    a, b, other = view(step, r.SOURCE), view(step, r.TARGET), view(step, r.OTHER)
    vectors, runs = step[r.VECTORS], step[r.RUNS]
    start, stop, first, last = span(step, item, b.channels, runs * vectors)
    while first < last:
        n, vector = first // vectors, first % vectors
        count = min(vectors - vector, last - first)
        call(
            step[r.KERNELS],
            (
                memory_at + 4 * (a.base + start * a.channel + n * a.image), 4 * a.channel,
                memory_at + 4 * (b.base + start * b.channel + n * b.image), 4 * b.channel,
                memory_at + 4 * (other.base + start * other.channel + n * other.image),
                4 * other.channel,
                step[r.SCALES] + 4 * start, step[r.SHIFTS] + 4 * start,
                step[r.MASK], step[r.WITHIN], vector, stop - start, count,
            ),
        )  # fmt: skip
        for channel in range(start, stop):
            if vector == 0:
                zero_beside(memory, b, channel, n, 0, batch)
            if vector + count == vectors:
                zero_beside(memory, b, channel, (n + 1) * batch // runs - 1, b.height - 1, batch)
        first += count

"""How far apart two cores are: the time that a line of memory takes from one to the other.

Two threads of one network write what the other reads, and on some machines the operating system or
a hypervisor moves them: next to each other in one round, on different parts of the processor in
another. Each core alone does not notice.
"""

from __future__ import annotations

import threading

import numpy as np
from numba import njit

from blocksparse.runtime.kernels.intrinsics import now, store
from blocksparse.runtime.kernels.program import wait

TURNS = 2000
"""Times the line goes there and back, some hundred microseconds; half as many before count not."""

_LINE = 64  # bytes


def handover(turns: int = TURNS) -> float:
    """Let two threads hand a line of memory to and fro.

    Parameters
    ----------
    turns : int
        Times it goes there and back while the clock runs.

    Returns
    -------
    float
        Nanoseconds one way, the mean.

    Raises
    ------
    RuntimeError
        If the line did not go to and fro as often as asked.
    """
    raw = np.zeros(3 * _LINE, np.uint8)
    at = raw.ctypes.data + -raw.ctypes.data % _LINE
    before = turns // 2
    other = threading.Thread(target=_bounce, args=(at, before, turns, 1))
    other.start()
    nanoseconds = _bounce(at, before, turns, 0)
    other.join()
    passed = int(raw[at - raw.ctypes.data :][:8].view(np.int64)[0])
    if passed != 2 * (before + turns):
        raise RuntimeError(f"a line was handed over {passed} times, not {2 * (before + turns)}")
    return float(nanoseconds / (2 * turns))


@njit(nogil=True)
def _bounce(at: int, before: int, turns: int, side: int) -> int:
    """Wait until the number at an address is ours, and make it the other's; return nanoseconds."""
    start = 0
    for turn in range(before + turns):
        if turn == before:
            start = now()
        wait(at, 2 * turn + side)
        store(at, 2 * turn + side + 1)
    return now() - start

"""Time several callables against each other so that the machine's drift hits them alike.

A clock that falls, a neighbour that wakes up or a thermal limit changes the speed of a machine
within seconds. Timing A to the end and then B compares two machines. Here the candidates take
turns, round by round, and the order is reversed every second round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """What one candidate took: median, quartiles and best over the rounds.

    Attributes
    ----------
    median_ms, q1_ms, q3_ms : float
        Milliseconds per call: the median, and the first and third quartile.
    best_ms : float
        Milliseconds of the fastest call: what the machine can do when nothing disturbs it.
    rounds : int
        How many calls were timed.
    """

    median_ms: float
    q1_ms: float
    q3_ms: float
    best_ms: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise the durations of single calls, in seconds.

        Raises
        ------
        ValueError
            If there are none.
        """
        if not seconds:
            raise ValueError("a timing needs at least one duration, and got none")
        q1, median, q3 = np.percentile(np.asarray(seconds) * 1e3, [25, 50, 75])
        return cls(float(median), float(q1), float(q3), min(seconds) * 1e3, len(seconds))

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms ({self.q1_ms:.3g} to {self.q3_ms:.3g})"


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    min_seconds: float = 0.0,
    settle: float = 0.0,
    on_round: Callable[[float], None] | None = None,
) -> dict[str, Timing]:
    """Time every candidate once per round, all in turn.

    In each turn only the last call of a candidate is timed. The one before, or as many as `settle`
    asks for, puts its own data into the caches, and lets thread pools that still spin after the
    previous candidate (OpenMP's do, for milliseconds) go to sleep before the clock starts.

    Parameters
    ----------
    candidates : mapping of str to callable
        What to time, called without arguments. Warm up what compiles on its first call before.
    rounds : int
        The least number of rounds.
    min_seconds : float
        Go on until the timed calls of all candidates together have taken this many seconds.
    settle : float
        The calls that are not timed go on for at least this many seconds; there is always one. For
        candidates that take less than their predecessors' threads spin.
    on_round : callable, optional
        Called after every round with the share of the work done, 0..1, for a progress bar.

    Returns
    -------
    dict of str to Timing
        In the order of `candidates`.

    Raises
    ------
    ValueError
        If `rounds` is below 1 or there is no candidate.

    Examples
    --------
    >>> timings = interleave({"sum": lambda: sum(range(100))}, rounds=5)
    >>> timings["sum"].rounds
    5
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least 1 round is needed to time anything")
    if not candidates:
        raise ValueError("there is nothing to time: candidates is empty")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    turns = list(candidates.items())
    spent, done = 0.0, 0
    collecting = gc.isenabled()
    gc.disable()  # as timeit does: a collection inside one call would be charged to it alone
    try:
        while done < rounds or spent < min_seconds:
            for name, call in turns:
                start = time.perf_counter()
                call()
                while time.perf_counter() - start < settle:
                    call()
                start = time.perf_counter()
                call()
                elapsed = time.perf_counter() - start
                seconds[name].append(elapsed)
                spent += elapsed
            turns.reverse()
            done += 1
            if on_round is not None:
                share = min(done / rounds, spent / min_seconds if min_seconds else 1.0)
                on_round(min(share, 1.0))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(values) for name, values in seconds.items()}

"""Where the time of one call went: what each thread noted at every step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .step import Step

CLOCK = hasattr(time, "CLOCK_MONOTONIC")
"""Whether compiled code can tell the time."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Where the time of one call went.

    Parameters
    ----------
    steps : list of Step
        What ran, in order.
    step_ns : ndarray of int64, shape (steps,)
        Nanoseconds from the end of the step before to the end of this one, waiting for other
        threads included. A step ends when the first thread sees that it has.
    busy_ns : ndarray of int64, shape (threads, steps)
        Nanoseconds each thread worked on the step before its end; the calling thread comes first.
        A thread that came late has zeros until then.
    """

    steps: list[Step]
    step_ns: npt.NDArray[np.int64]
    busy_ns: npt.NDArray[np.int64]

    def __add__(self, other: Trace) -> Trace:
        """Return where the time of two calls of one network and number of threads went."""
        return Trace(self.steps, self.step_ns + other.step_ns, self.busy_ns + other.busy_ns)

    def by_node(self) -> dict[str, float]:
        """Milliseconds of every node: the sum of the steps that count to it, see `Step.owner`."""
        result: dict[str, float] = {}
        for step, nanoseconds in zip(self.steps, self.step_ns.tolist(), strict=True):
            result[step.owner] = result.get(step.owner, 0.0) + nanoseconds / 1e6
        return result


def side_by_side(own: list[list[Trace]]) -> list[Trace]:
    """Return the trace of threads that each made calls of their own, if any did.

    Its steps take a mean of the threads: all of them together, what the threads were at it.
    """
    calls = [call for calls in own for call in calls]
    if not calls:
        return []
    nothing = np.zeros_like(calls[0].step_ns)
    busy = np.stack([sum((call.busy_ns[0] for call in calls), nothing) for calls in own])
    step = sum((call.step_ns for call in calls), nothing) // len(own)
    return [Trace(calls[0].steps, step, busy)]


def blank_times(records: int, threads: int) -> list[npt.NDArray[np.int64]]:
    """Return what every thread notes its times in, for so many records: `times` of the loops."""
    return [np.zeros((records + 1, 2), np.int64) for _ in range(threads)]


def trace(
    steps: list[Step], origins: npt.NDArray[np.int64], times: list[npt.NDArray[np.int64]]
) -> Trace:
    """Read what the threads noted, the calling thread first; `origins` are the plan's."""
    own, seen = np.moveaxis(np.stack(times), 2, 0)  # each (threads, records + 1)
    came = seen > 0
    # No single thread tells when steps ended: one that loses its core for a while finds several
    # done when it is back, and would give the first of them its absence and the others no time.
    ends = np.where(came, seen, np.iinfo(np.int64).max).min(axis=0)
    busy = np.minimum(own[:, 1:], ends[1:]) - seen[:, :-1]
    busy = np.where(came[:, 1:], np.maximum(busy, 0), 0)
    of_step = origins == np.arange(len(steps))[:, None]
    return Trace(steps, of_step @ np.diff(ends), busy @ of_step.T)

"""What one call writes to: values, counters, scratch memory."""

from __future__ import annotations

import math
from array import array

import numpy as np
import numpy.typing as npt

from .kernels import call_record as c
from .limits import usable_cores
from .locks import renew_after_fork
from .plan import Plan

_CACHE_LINE = 64

_DATA = object.__basicsize__
"""Where in an array object NumPy keeps the address of its numbers: the first field behind Python's,
by the C interface that every extension is compiled against. In the middle of a large network, when
nothing of Python is in the caches, `ndarray.ctypes` takes 50 microseconds to tell it.
"""

STAY = 300_000
"""Nanoseconds for which a helper that is done waits for the next call. To wake one takes 40
microseconds of a call, and it comes 40 later, on a busy machine 100, for it has to be given the
interpreter's lock. Between two calls of a large network, 100 microseconds go by in Python."""


class CallMemory:
    """What one call writes to. Calls at the same time have one each.

    Parameters
    ----------
    plan : Plan
        What is run.
    pending : array of int64
        `Helpers.pending` of whoever will help.
    """

    def __init__(self, plan: Plan, pending: array[int]) -> None:
        self.plan = plan  # its records hold addresses of its arrays
        self._pending = pending  # late helpers write to it, whatever became of the others
        self.given: tuple[object, ...] = ()  # what the threads of a call read
        self._scratch: list[tuple[npt.NDArray[np.float32], int]] = []
        self._scratch_bytes = plan.scratch
        # zeroed once: lanes beyond an image are computed on, and must not hold signalling garbage
        # a line in front: the left neighbour of the first pixel is read before it is masked
        raw = np.zeros(plan.floats + 2 * _CACHE_LINE // 4, np.float32)
        skip = _CACHE_LINE // 4 + -raw.ctypes.data % _CACHE_LINE // 4
        values = raw[skip : skip + plan.floats]
        size = c.GATE + plan.counters
        counters = np.zeros(size + _CACHE_LINE // 8, np.int64)
        skip = -counters.ctypes.data % _CACHE_LINE // 8
        self.values, self.counters = values, counters[skip : skip + size]
        self._number = 1
        self.counters[0] = self._number << 32
        self._record = array("q", [0] * c.FIELDS)
        for at, given in (
            (c.STEPS_AT, plan.records), (c.TABLES_AT, plan.integers),
            (c.MEMORY_AT, values),
        ):  # fmt: skip
            self._record[at], self._record[at + 1] = given.ctypes.data, given.size
        self._record[c.STEPS], self._record[c.BATCH] = len(plan.records), plan.inputs[0]
        self._record[c.INPUT_SIZE] = math.prod(plan.inputs)
        self._record[c.OUTPUT_SIZE] = math.prod(plan.outputs)
        self._record[c.COUNTERS_AT] = self.counters.ctypes.data
        self._record[c.PENDING_AT], _ = pending.buffer_info()
        self._record[c.CORES], self._record[c.STAY] = usable_cores(), STAY
        renew_after_fork(self)

    def renew(self) -> None:
        """Expect no helper of the parent process any more."""
        for thread in range(len(self._scratch)):
            self._record[c.FIELDS + thread * c.OWN_FIELDS + c.WAITING] = 0

    def call(
        self,
        images: npt.NDArray[np.float32],
        output: npt.NDArray[np.float32],
        threads: int,
        times: list[npt.NDArray[np.int64]] | None = None,
    ) -> tuple[array[int], int]:
        """Write what the threads of the next call are given.

        Every call returned from here has to be run to its end before the next one: `program.run`
        clears the counters for it. Then `given` may be emptied.

        Parameters
        ----------
        images, output : ndarray of float32
            Contiguous, of the plan's shapes.
        threads : int
            How many there are, the caller's included.
        times : list of ndarray of int64, optional
            What each thread notes its times in, see `trace.blank_times`.

        Returns
        -------
        record : array of int64
            What `program.run` is given the address of.
        number : int
            Of the call. Both this memory and the record live as long as any thread may read them.
        """
        if len(self._scratch) < threads:
            self.scratch(threads - 1)
        self.given = images, output, times
        record, number = self._record, self._number
        record[c.INPUT_AT_AT] = id(images) + _DATA
        record[c.OUTPUT_AT_AT] = id(output) + _DATA
        record[c.THREADS], record[c.NEXT] = threads, number
        record[c.TIMES_ROWS] = 0
        if times is not None:
            record[c.TIMES_ROWS] = len(times[0])
            for thread, own in enumerate(times):
                record[c.FIELDS + thread * c.OWN_FIELDS + c.TIMES_AT] = own.ctypes.data
        self._number = (number + 1) % c.NUMBERS
        return record, number

    def missing(self, threads: int) -> list[int]:
        """Numbers of the helpers that are not here, waiting for the next call."""
        record, first = self._record, c.FIELDS + c.WAITING
        return [k for k in range(1, threads) if not record[first + k * c.OWN_FIELDS]]

    def scratch(self, thread: int) -> int:
        """Address of the scratch memory of a thread."""
        while len(self._scratch) <= thread:
            raw = np.zeros((self._scratch_bytes + _CACHE_LINE) // 4, np.float32)
            address = int(raw.ctypes.data)
            address += -address % _CACHE_LINE
            # a new one: a late helper may still read the one that was too short, and leave
            short, own = self._record, [0] * c.OWN_FIELDS
            own[c.SCRATCH_AT] = address
            self._record = short + array("q", own)
            self._scratch.append((raw, address))
            short[c.THREADS] = 0
            self.renew()
        return self._scratch[thread][1]

"""What one call writes to: outputs, values, counters, scratch memory."""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from .kernels import call_record as c
from .plan import Plan

_CACHE_LINE = 64


class CallMemory:
    """What one call writes to. Calls at the same time have one each."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan  # its records hold addresses of its arrays
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
        self.output = np.empty(plan.outputs, np.float32)
        self.calls = 0
        # written once but for a few fields: looking up an address takes a microsecond, and far
        # more in the middle of a large network, when nothing of Python is in the caches
        self._record = array("q", [0] * c.FIELDS)
        for at, given in (
            (c.STEPS_AT, plan.records), (c.TABLES_AT, plan.integers),
            (c.MEMORY_AT, values), (c.OUTPUT_AT, self.output),
        ):  # fmt: skip
            self._record[at], self._record[at + 1] = given.ctypes.data, given.size
        self._record[c.STEPS], self._record[c.BATCH] = len(plan.records), len(self.output)
        self._record[c.COUNTERS_AT] = self.counters.ctypes.data

    def call(
        self, images: npt.NDArray[np.float32], times: list[npt.NDArray[np.int64]]
    ) -> tuple[array[int], int]:
        """Zero the counters, let helpers in, and write what the threads are given.

        Parameters
        ----------
        images : ndarray of float32
            Contiguous, as many as the plan is for.
        times : list of ndarray of int64
            What each thread notes its times in, see `trace.blank_times`.

        Returns
        -------
        record : array of int64
            What `program.run` is given the address of.
        number : int
            Of the call. Both this memory and the record live as long as any thread may read them.
        """
        self.scratch(len(times) - 1)
        record = self._record
        record[c.INPUT_AT], record[c.INPUT_SIZE] = images.ctypes.data, images.size
        record[c.THREADS], record[c.TIMES_ROWS] = len(times), len(times[0])
        if len(times[0]):
            for thread, own in enumerate(times):
                record[c.FIELDS + thread * c.OWN_FIELDS + c.TIMES_AT] = own.ctypes.data
        self.calls = (self.calls + 1) % 2**31
        self.counters[1:] = 0
        self.counters[0] = self.calls << 32
        return record, self.calls

    def scratch(self, thread: int) -> int:
        """Address of the scratch memory of a thread."""
        while len(self._scratch) <= thread:
            raw = np.zeros((self._scratch_bytes + _CACHE_LINE) // 4, np.float32)
            address = int(raw.ctypes.data)
            self._scratch.append((raw, address + -address % _CACHE_LINE))
            # a new one: a late helper may still read the one that was too short
            self._record = self._record + array("q", [self._scratch[-1][1], 0])
        return self._scratch[thread][1]

"""What one call writes to: outputs, values, counters, scratch memory."""

from __future__ import annotations

from array import array
from typing import NamedTuple

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
        # what is the same in every call: looking up an address takes a microsecond
        self._fixed = [0] * c.FIELDS
        for at, given in (
            (c.STEPS_AT, plan.records), (c.TABLES_AT, plan.integers),
            (c.VECTORS_AT, plan.vectors), (c.MEMORY_AT, values), (c.OUTPUT_AT, self.output),
        ):  # fmt: skip
            self._fixed[at : at + 2] = given.ctypes.data, given.size
        self._fixed[c.STEPS] = len(plan.records)
        self._fixed[c.COUNTERS_AT] = self.counters.ctypes.data

    def call(
        self,
        images: npt.NDArray[np.float32],
        times: list[npt.NDArray[np.int64]],
    ) -> Call:
        """Zero the counters, let helpers in, and write what each thread is given.

        Parameters
        ----------
        images : ndarray of float32
            Contiguous, as many as the plan is for.
        times : list of ndarray of int64
            What each thread notes its times in, see `trace.blank_times`.
        """
        self.calls = (self.calls + 1) % 2**31
        self.counters[1:] = 0
        self.counters[0] = self.calls << 32
        # plain lists: assignments to parts of a NumPy array took 27 microseconds, this 5
        shared = self._fixed.copy()
        shared[c.INPUT_AT : c.INPUT_AT + 2] = images.ctypes.data, images.size
        shared[c.BATCH], shared[c.NUMBER], shared[c.THREADS] = len(images), self.calls, len(times)
        rows = array("q")
        for thread, own in enumerate(times):
            shared[c.THREAD], shared[c.SCRATCH_AT] = thread, self.scratch(thread)
            if len(own):
                shared[c.TIMES_AT : c.TIMES_AT + 2] = own.ctypes.data, len(own)
            rows.extend(shared)
        return Call(rows, self, images, times)

    def scratch(self, thread: int) -> int:
        """Address of the scratch memory of a thread."""
        while len(self._scratch) <= thread:
            raw = np.zeros((self._scratch_bytes + _CACHE_LINE) // 4, np.float32)
            address = int(raw.ctypes.data)
            self._scratch.append((raw, address + -address % _CACHE_LINE))
        return self._scratch[thread][1]


class Call(NamedTuple):
    """One call, and whatever its records hold addresses of; a late helper still reads the gate.

    Attributes
    ----------
    records : array of int64
        What each thread is given, `call_record.FIELDS` values each.
    memory : CallMemory
        Outputs, values, counters, scratch memory.
    images : ndarray of float32
        What is read.
    times : list of ndarray of int64
        What each thread notes its times in.
    """

    records: array[int]
    memory: CallMemory
    images: npt.NDArray[np.float32]
    times: list[npt.NDArray[np.int64]]

    def address(self, thread: int) -> int:
        """Address of what a thread is given."""
        return self.records.buffer_info()[0] + thread * c.FIELDS * self.records.itemsize

"""What one call writes to: values, counters, scratch memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .kernels import program
from .plan import Plan

_CACHE_LINE = 64


class CallMemory:
    """What one call writes to: values and counters. Calls at the same time have one each."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan  # its records hold addresses of its arrays
        self._scratch: list[tuple[npt.NDArray[np.float32], int]] = []
        self._scratch_bytes = plan.scratch
        # zeroed once: lanes beyond an image are computed on, and must not hold signalling garbage
        # a line in front: the left neighbour of the first pixel is read before it is masked
        raw = np.zeros(plan.floats + 2 * _CACHE_LINE // 4, np.float32)
        skip = _CACHE_LINE // 4 + -raw.ctypes.data % _CACHE_LINE // 4
        values = raw[skip : skip + plan.floats]
        size = program.GATE + plan.counters
        counters = np.zeros(size + _CACHE_LINE // 8, np.int64)
        skip = -counters.ctypes.data % _CACHE_LINE // 8
        self.counters = counters[skip : skip + size]
        self.calls = 0
        # what `program.run` takes first; looking up an address takes a microsecond
        self.fixed = (
            plan.records, plan.integers, plan.vectors, values, values.ctypes.data, self.counters
        )  # fmt: skip

    def open_gate(self) -> int:
        """Zero the counters and let helpers in; return the number of the call."""
        self.calls = (self.calls + 1) % 2**31
        self.counters[1:] = 0
        self.counters[0] = self.calls << 32
        return self.calls

    def scratch(self, thread: int) -> int:
        """Address of the scratch memory of a thread."""
        while len(self._scratch) <= thread:
            raw = np.zeros((self._scratch_bytes + _CACHE_LINE) // 4, np.float32)
            address = int(raw.ctypes.data)
            self._scratch.append((raw, address + -address % _CACHE_LINE))
        return self._scratch[thread][1]

"""Notes what the threads of a compiled engine compute."""

from __future__ import annotations

import ctypes
from functools import partial

from blocksparse.runtime.kernels import call_record as c
from blocksparse.runtime.kernels import records
from blocksparse.runtime.pieces import Piece


class Watch:
    """Notes the items of all steps in the order in which they are computed."""

    def __init__(self, engine, batch):
        (self.memory,) = engine._ready[batch, False, Piece.ALL].free
        self.steps = self.memory.plan.records
        self.items = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * 5)
        self.computes = self.steps[:, records.COMPUTE].copy()
        self.kept = [kind(partial(self.compute, kind(int(at)))) for at in self.computes]

    def compute(self, real, record, step, item, scratch, number):
        self.items.append((number, item))
        return real(record, step, item, scratch, number)

    def __enter__(self):
        self.steps[:, records.COMPUTE] = [
            ctypes.cast(compute, ctypes.c_void_p).value for compute in self.kept
        ]
        return self

    def __exit__(self, *error):
        self.steps[:, records.COMPUTE] = self.computes
        if error[0] is None:
            self.assert_every_item_once()

    def assert_every_item_once(self):
        counts = self.steps[:, records.ITEMS].tolist()
        assert sorted(self.items) == [
            (s, k) for s, count in enumerate(counts) for k in range(count)
        ]
        assert not self.memory.counters[2:].any(), "cleared for the next call"
        assert not self.memory.counters[0] & (2 * c.SHUT - 1), "its gate is open"

    def assert_order(self, thread, queues):
        """One thread alone empties its own queue, then the next, in every step."""
        expected = []
        for s, count in enumerate(self.steps[:, records.ITEMS].tolist()):
            for turn in range(queues):
                queue = (thread + turn) % queues
                held = range(count * queue // queues, count * (queue + 1) // queues)
                expected += [(s, item) for item in held]
        assert self.items == expected

"""The compiled engine taken apart: micro-kernels called alone, and memory as one likes it."""

from __future__ import annotations

import ctypes
from array import array
from dataclasses import replace

import numpy as np

from blocksparse.runtime import algorithms, compiled
from blocksparse.runtime.calls import CallMemory
from blocksparse.runtime.kernels import call_record as c
from blocksparse.runtime.kernels import objects, records
from blocksparse.runtime.kernels.target import host
from blocksparse.runtime.layout import ALIGN, round_up
from blocksparse.runtime.pieces import cut
from blocksparse.runtime.steps import lower

LANES = (4, 8, 16)
"""Vector lengths; LLVM cuts those the processor does not have."""

SENTINEL = np.float32(-7.25e33)
"""What nobody computes: a float that still holds it was not written."""

GUARD = 4096
"""Bytes behind a thread's scratch memory that nobody may write to."""


def narrow(lanes):
    """The host, with vectors of `lanes` floats."""
    return replace(host(), lanes=lanes, rows=8 if lanes == 16 else 4)


def call(kernel, lanes, *arguments):
    """Call a micro-kernel; arrays are passed by address."""
    address = objects.address(kernel, narrow(lanes))
    values = [a.ctypes.data if isinstance(a, np.ndarray) else int(a) for a in arguments]
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(values))(address)(*values)


def bits(flags, lanes):
    """Masks of whole vectors, first lane in the lowest bit, from flags along the last axis."""
    flags = np.asarray(flags, bool)
    flags = flags.reshape(*flags.shape[:-1], -1, lanes)
    return np.ascontiguousarray(np.packbits(flags, axis=-1, bitorder="little"))


def engine_of(model, lanes=None):
    """A compiled engine, if asked for with vectors of another length."""
    kept = compiled.host
    compiled.host = kept if lanes is None else lambda: narrow(lanes)
    try:
        return compiled.CompiledEngine(model)
    finally:
        compiled.host = kept


def forced(model, way, lanes=None):
    """A compiled engine that computes every convolution one way, if it has that way."""
    engine = engine_of(model, lanes)
    ways = {
        node.name: way
        for node in model.graph.nodes
        if node.op == "conv2d"
        and way in algorithms.ways(node, model.weights[node.name], engine.target, True)
    }
    assert ways
    engine._pieces = cut(lower(model, engine.target, ways))
    return engine


class Helpers:
    """In place of the engine's helpers: does with their calls what a test wants."""

    pending = array("q", [0, 0])

    def __init__(self, act=lambda work, calls: None):
        self.act, self.calls = act, []

    def start(self, work, numbers, at, number, kept):
        """Take the calls of all threads but the caller's, and what the caller lets go of behind."""
        kept = (*kept, kept[0].given)
        self.calls = [(thread, at, number, kept) for thread in numbers]
        self.act(work, self.calls)

    def close(self):
        """Nothing is held."""


def assert_same_bits(engine, x):
    """Check that neither threads nor repetition nor the order of items change a bit."""
    expected = engine.run(x, 1)
    for threads in (1, 2, 3, 9):
        for _ in range(3):
            np.testing.assert_array_equal(engine.run(x, threads), expected)
    engine._helpers.close()  # nobody waits any more
    engine._helpers = Helpers()
    engine.run(x, 2)
    shuffled(engine._helpers.calls[0], expected)


def assert_same_over(engine, x):
    """Check that results do not depend on what memory held; return them, finite and not all 0."""
    clean, _, _ = run_over(engine, x, 0)
    for fill in (np.nan, 1e30):
        dirty, _, _ = run_over(engine, x, fill)
        np.testing.assert_array_equal(dirty, clean)
    assert np.isfinite(clean).all()
    assert np.abs(clean).max() > 0
    return clean


def shuffled(call, expected, seeds=(0, 1)):
    """Compute the items of a helper's call in random orders, over memory full of NaN."""
    _, at, _, (memory, record, (_, output, _)) = call
    scratch_at = record[c.FIELDS + c.OWN_FIELDS + c.SCRATCH_AT]
    kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * 5)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        memory.values[:] = np.nan
        output[:] = np.nan
        steps = memory.plan.records
        at_once: list[tuple[int, int]] = []
        for s, step in enumerate(steps):
            at_once += [(s, item) for item in range(step[records.ITEMS])]
            if step[records.JOINED]:  # the next runs at the same time
                continue
            for n, item in rng.permutation(np.reshape(at_once, (-1, 2))).tolist():
                compute = kind(int(steps[n, records.COMPUTE]))
                assert compute(at, steps[n].ctypes.data, item, scratch_at, n) == 0
            at_once = []
        np.testing.assert_array_equal(output, expected)


def run_over(engine, x, fill, threads=1):
    """Run in memory that held `fill`; return the output, the plan and the memory."""
    ready = engine._plan(len(x), threads)
    memory = CallMemory(ready.plan, engine._helpers.pending)
    values = memory.values
    values[:] = fill
    memory._scratch_bytes += GUARD
    beyond = []
    for thread in range(threads):
        end = memory.scratch(thread) + ready.plan.scratch
        raw = memory._scratch[thread][0]
        raw[:] = fill
        first = (end - raw.ctypes.data) // 4
        beyond.append(raw[first : first + GUARD // 4].view(np.int32))
    before = np.array(beyond)
    ready.free.append(memory)
    output = engine.run(x, threads)
    np.testing.assert_array_equal(beyond, before, "written beyond the scratch memory")
    return output, ready.plan, values


def targets(plan, *ops):
    """Layouts of what the steps write, those of some kinds if any are named."""
    return [
        records.layout_at(record, records.TARGET)
        for record in plan.records
        if record[records.OP] in (ops or set(range(32)) - {records.STORE})
    ]


def pixels(where, batch):
    """Places of the pixels of a value in memory, (N, C, H, W)."""
    n, c, y, x = np.ogrid[:batch, : where.channels, : where.height, : where.width]
    return where.base + c * where.channel + n * where.image + y * where.row + x


def assert_zeros_around(values, plan, op, batch):
    """A reader of what the steps of a kind write finds zeros between and around its pixels."""
    for where in targets(plan, op):
        written = np.zeros(len(values), bool)
        written[pixels(where, batch)] = True
        end = where.run(batch) + where.margin
        for channel in range(where.channels):
            start = where.base + channel * where.channel
            around = slice(start - where.margin, start + end)
            assert not values[around][~written[around]].any()


def assert_nothing_else_written(values, plan, batch):
    """Only rows of the steps' own values, and the zeros around them, may have been written."""
    allowed = np.zeros(len(values), bool)
    # they write whole vectors
    whole = targets(plan, records.CONV, records.CONV_NM, records.LINES_CONV)
    for where in targets(plan):
        margin = max(where.margin, 0)
        # the last row may be filled up to the next one
        end = (batch - 1) * where.image + where.height * where.row + margin
        if where in whole:  # one channel in one piece
            end = max(end, round_up(where.run(batch), ALIGN))
        for channel in range(where.channels):
            start = where.base + channel * where.channel
            allowed[start - margin : start + end] = True
    written = values.view(np.int32) != SENTINEL.view(np.int32)
    assert not (written & ~allowed).any(), np.flatnonzero(written & ~allowed)[:8]

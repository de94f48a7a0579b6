"""A whole network in one compiled call.

Every thread walks the same list of steps and takes work items until a step has none left, then
waits for the items that others are still computing. Nobody waits for a thread to arrive: a helper
that the operating system starts late, or never, only leaves more items to the others. Helpers enter
through a gate, which the calling thread shuts when all is done, and who comes after that leaves
again; so a call does not wait for the operating system at its end either. An item always computes
the same outputs in the same order, so results do not depend on the number of threads.

The items of a step are cut into one queue a thread, in order; a thread empties its own queue first
and then helps with the next. Items lie in the order of pixels, so a thread reads most of what it
wrote in the step before from its own second-level cache, and not, slowly, from another core's: on
two cores ResNet-50 at 90 % sparsity took 7.6 ms in place of 8.4 with one queue for all.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from . import records as r
from .convolution import conv_item
from .copying import copy_item, phases_item
from .elementwise import elementwise_item
from .intrinsics import compare_exchange, fetch_add, give_way, load_acquire, now, pause, store
from .linear import linear_item
from .pooling import adaptive_pool_item, pool_item
from .winograd import winograd_item
from .winograd_tiles import tiles_item

QUEUES = 8
"""Most queues that the items of a step are cut into; more threads than that share them."""

LINE = 8
"""int64 values of a cache line; every counter has one of its own."""

LINGER = 500
"""Turns of a waiting loop that a helper takes on its way out, some ten microseconds."""

GATE = 2 * LINE
"""int64 values before the counters: the gate, and how many helpers have left through it."""

SHUT = 1 << 31
"""Bit of the gate. Below it, the helpers that entered; above it, the number of the call."""

COUNTER_STRIDE = LINE * (1 + QUEUES)
"""int64 counters of one step: finished items, then the items taken from every queue."""

PATIENCE = 2000
"""Rounds of the waiting loop, tens of microseconds, before the core is offered to others."""


@njit(cache=True, nogil=True)
def run(
    program: Any, tables: Any, vectors: Any, memory: Any, memory_at: int, counters: Any, x: Any,
    y: Any, batch: int, times: Any, thread: int, threads: int,
    scratch_at: int, call_number: int,
) -> None:  # fmt: skip
    """Run a program, or help to.

    Parameters
    ----------
    program : ndarray of int64, shape (steps, records.FIELDS)
        The steps.
    tables : ndarray of int64, 1-D
        Row tiles, part boundaries, phase shifts.
    vectors : ndarray of float32, 1-D
        Scales and shifts.
    memory : ndarray of float32, 1-D
        Where all values lie; ``memory_at`` is its address.
    counters : ndarray of int64, shape (GATE + steps * COUNTER_STRIDE,)
        Zeros but for the first, the open gate: ``call << 32``.
    x, y : ndarray of float32, 1-D
        Input and output, contiguous.
    batch : int
        Images.
    times : ndarray of int64, shape (steps + 1, 2) or (0, 2)
        Receives when this thread had done its own part of a step, and when the step was done by
        all, in nanoseconds; the first row receives the start. With no rows nothing is noted.
    thread, threads : int
        Which thread this is, from 0, of how many.
    scratch_at : int
        Address of this thread's own scratch memory.
    call_number : int
        Which call this thread is here for; the helpers of one that is over leave again.
    """
    gate = counters.ctypes.data
    if thread > 0 and not _enter(gate, call_number):
        return
    counters_at = gate + 8 * GATE
    timed = times.shape[0] > 0
    store(scratch_at, -1)  # it holds nothing of this call yet
    queues = min(threads, QUEUES)
    if timed:
        times[0, :] = now()
    for s in range(program.shape[0]):
        step = program[s]
        items = step[r.ITEMS]
        finished = counters_at + 8 * COUNTER_STRIDE * s
        for turn in range(queues):
            queue = (thread + turn) % queues
            taken = finished + 8 * LINE * (1 + queue)
            first, end = items * queue // queues, items * (queue + 1) // queues
            while True:
                item = first + fetch_add(taken, 1)
                if item >= end:
                    break
                _run_item(
                    step, tables, vectors, memory, memory_at, x, y, item, batch, scratch_at, s
                )
                fetch_add(finished, 1)
        if timed:
            times[s + 1, 0] = now()
        _wait(finished, items)
        if timed:
            times[s + 1, 1] = now()
    left = gate + 8 * LINE
    if thread > 0:
        fetch_add(left, 1)
        # Back in Python this thread takes the interpreter's lock. The caller wants it now.
        for _ in range(LINGER):
            pause()
    else:
        entered = fetch_add(gate, SHUT) & (SHUT - 1)
        _wait(left, entered)  # they are past their last item


@njit(cache=True, nogil=True)
def _wait(counter: int, count: int) -> None:
    spins = 0
    while load_acquire(counter) < count:
        pause()
        spins += 1
        if spins % PATIENCE == 0:  # the thread we wait for may want this very core
            give_way()


@njit(cache=True, nogil=True)
def _enter(gate: int, call_number: int) -> bool:
    while True:
        state = load_acquire(gate)
        if state >> 32 != call_number or state & SHUT:
            return False
        if compare_exchange(gate, state, state + 1):
            return True


@njit(cache=True, nogil=True)
def _run_item(
    step: Any, tables: Any, vectors: Any, memory: Any, memory_at: int, x: Any, y: Any, item: int,
    batch: int, scratch_at: int, s: int,
) -> None:  # fmt: skip
    op = step[r.OP]
    if op == r.CONV or op == r.CONV_NM:
        conv_item(memory, memory_at, step, tables, item, batch)
    elif op == r.WINOGRAD:
        winograd_item(memory, memory_at, step, tables, item, batch, scratch_at, s)
    elif op == r.TILES_CONV:
        tiles_item(memory, memory_at, step, tables, item, batch, scratch_at, s)
    elif op == r.LINEAR or op == r.LINEAR_NM:
        linear_item(memory_at, step, tables, item, batch)
    elif op == r.POOL:
        pool_item(memory, memory_at, step, item, batch)
    elif op == r.ADAPTIVE_POOL:
        adaptive_pool_item(memory, step, item, batch)
    elif op == r.ELEMENTWISE:
        elementwise_item(memory, step, vectors, item, batch)
    elif op == r.COPY and step[r.FAST]:
        phases_item(memory, memory_at, step, tables, item, batch)
    elif op == r.COPY:
        copy_item(memory, memory, step, tables, item, batch)
    elif op == r.LOAD:
        copy_item(x, memory, step, tables, item, batch)
    elif op == r.STORE:
        copy_item(memory, y, step, tables, item, batch)

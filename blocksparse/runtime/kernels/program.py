"""A whole network in one compiled call.

Every thread walks the same list of steps and takes work items until a step has none left, then
waits for the items that others are still computing. Nobody waits for a thread to arrive: a helper
that the operating system starts late, or never, only leaves more items to the others. Helpers enter
through a gate, which the calling thread shuts when all is done, and who comes after that leaves
again; so a call does not wait for the operating system at its end either. An item always computes
the same outputs in the same order, so results do not depend on the number of threads.

The items of a step are cut into one queue a thread, in order, but at most `call_record.QUEUES`,
which more threads share; a thread empties its own queue first and then helps with the next. Items
lie in the order of pixels, so a thread reads most of what it wrote in the step before from its own
second-level cache, and not, slowly, from another core's: on two cores ResNet-50 at 90 % sparsity
took 7.6 ms in place of 8.4 with one queue for all.
"""

from __future__ import annotations

from . import call_record as c
from . import records as r
from .intrinsics import (
    compare_exchange,
    fetch_add,
    give_way,
    integers_at,
    load_acquire,
    now,
    pause,
    status_of,
    store,
)
from .loop import loop

LINGER = 500
"""Turns of a waiting loop that a helper takes on its way out, some ten microseconds."""

PATIENCE = 2000
"""Rounds of the waiting loop, tens of microseconds, before the core is offered to others."""


def run(record_at: int, thread: int, number: int) -> None:
    """Run a program, or help to.

    Compiled by `compiler.loop_text`; it takes nothing but integers, so that it can be called
    without Numba.

    Parameters
    ----------
    record_at : int
        Address of what `call_record` describes. Where times are noted, this thread writes in row
        s + 1 when it had done its own part of step s, and when the step was done by all, in
        nanoseconds; the first row receives the start.
    thread : int
        Which this is, from 0, the caller.
    number : int
        The call this thread is here for; the helpers of one that is over leave again.
    """
    call = integers_at(record_at, c.FIELDS)
    gate, threads = call[c.COUNTERS_AT], call[c.THREADS]
    if thread > 0 and not _enter(gate, number):
        return
    own = integers_at(record_at + 8 * (c.FIELDS + thread * c.OWN_FIELDS), c.OWN_FIELDS)
    scratch_at = own[c.SCRATCH_AT]
    times = integers_at(own[c.TIMES_AT], 2 * call[c.TIMES_ROWS])
    left = gate + 8 * c.LINE
    failed = left + 8
    counters_at = gate + 8 * c.GATE
    timed = times.size > 0
    store(scratch_at, -1)  # it holds nothing of this call yet
    queues = min(threads, c.QUEUES)
    if timed:
        times[0] = times[1] = now()
    for s in range(call[c.STEPS]):
        step_at = call[c.STEPS_AT] + 8 * r.FIELDS * s
        step = integers_at(step_at, r.FIELDS)
        items = step[r.ITEMS]
        finished = counters_at + 8 * c.COUNTER_STRIDE * s
        for turn in range(queues):
            queue = (thread + turn) % queues
            taken = finished + 8 * c.LINE * (1 + queue)
            first, end = items * queue // queues, items * (queue + 1) // queues
            while True:
                item = first + fetch_add(taken, 1)
                if item >= end:
                    break
                if status_of(step[r.COMPUTE], (record_at, step_at, item, scratch_at, s)) != 0:
                    # it counts as done, or the others would wait for it
                    store(failed, 1)
                fetch_add(finished, 1)
        if timed:
            times[2 * s + 2] = now()
        wait(finished, items)
        if timed:
            times[2 * s + 3] = now()
    if thread > 0:
        fetch_add(left, 1)
        # Back in Python this thread takes the interpreter's lock. The caller wants it now.
        for _ in range(LINGER):
            pause()
    else:
        entered = fetch_add(gate, c.SHUT) & (c.SHUT - 1)
        wait(left, entered)  # they are past their last item
        if load_acquire(failed) != 0:
            raise RuntimeError


@loop
def wait(counter: int, count: int) -> None:
    """Wait until the number at an address has reached a count."""
    spins = 0
    while load_acquire(counter) < count:
        pause()
        spins += 1
        if spins % PATIENCE == 0:  # the thread we wait for may want this very core
            give_way()


@loop
def _enter(gate: int, call_number: int) -> bool:
    while True:
        state = load_acquire(gate)
        if state >> 32 != call_number or state & c.SHUT:
            return False
        if compare_exchange(gate, state, state + 1):
            return True

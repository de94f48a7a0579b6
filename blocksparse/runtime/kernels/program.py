"""A whole network in one compiled call.

Every thread walks the same list of steps and takes work items until a step has none left, then
waits for the items that others are still computing. Nobody waits for a thread to arrive: a helper
that the operating system starts late, or never, only leaves more items to the others. Helpers enter
through a gate, which the calling thread shuts when all is done, and who comes after that leaves
again; so a call does not wait for the operating system at its end either. Then they wait a moment
for the next call, which need not wake them. An item always computes the same outputs in the same
order, whoever takes it.

The items of a step are cut into one queue a thread, in order, but at most `call_record.QUEUES`,
which more threads share; a thread empties its own queue first and then helps with the next. Items
lie in the order of pixels, so a thread reads most of what it wrote in the step before from its own
second-level cache, and not, slowly, from another core's: on two cores ResNet-50 at 90 % sparsity
took 7.6 ms in place of 8.4 with one queue for all.

Two steps that are *joined*, the halves of one image (see `halves`), run as one: the items of the
second are counted behind those of the first, and half of the queues are its own. Each half has
memory in which one thread should write. So when all helpers are there, whoever has done a half
helps with the other only where much of it is left, and with the rest only after long waiting.
"""

from __future__ import annotations

from typing import Any

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

GRACE = 100_000
"""Nanoseconds for which it still comes, after it has said that it will not: a caller that counts on
it is on its way."""

LONG = 10_000
"""Turns of a waiting loop for which the rest of the other half of a step is left to its thread."""

REST = 8
"""One part in so many of a half is such a rest: to help takes lines of cache away from whose memory
it is, now and in the steps behind. With 2, two networks took 2 to 4 % longer on cores that lie near
each other than in one piece, and 20 % less on those that lie far apart; with 8 as long, and 10 to
15 % less."""

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
    gate = call[c.COUNTERS_AT]
    left = gate + 8 * c.LINE
    if thread > 0:
        fetch_add(call[c.PENDING_AT] + 8, 1)
        while _claim(record_at, gate, thread, number) and _enter(gate, number):
            _walk(record_at, thread)
            fetch_add(left, 1)
            number = (number + 1) % c.NUMBERS
            if not _stay(record_at, thread, number):
                return
        return
    fetch_add(gate + 8, number - load_acquire(gate + 8))  # to helpers that wait: here it is
    _walk(record_at, 0)
    entered = fetch_add(gate, c.SHUT) & (c.SHUT - 1)
    wait(left, entered)  # they are past their last item
    failed = load_acquire(left + 8) != 0
    _clear(call, min(call[c.THREADS], c.QUEUES))
    # whoever comes late for this call finds the gate of the next one
    store(gate, (number + 1) % c.NUMBERS << 32)
    if failed:
        raise RuntimeError


@loop
def _walk(record_at: int, thread: int) -> None:
    """Take part in all steps, and return when they are done."""
    call = integers_at(record_at, c.FIELDS)
    gate, threads = call[c.COUNTERS_AT], call[c.THREADS]
    own = integers_at(record_at + 8 * (c.FIELDS + thread * c.OWN_FIELDS), c.OWN_FIELDS)
    scratch_at = own[c.SCRATCH_AT]
    times = integers_at(own[c.TIMES_AT], 2 * call[c.TIMES_ROWS])
    counters_at = gate + 8 * c.GATE
    timed = times.size > 0
    store(scratch_at, -1)  # it holds nothing of this call yet
    queues = min(threads, c.QUEUES)
    if timed:
        times[0] = times[1] = now()
    complete = False  # whether all helpers are here
    s = 0
    while s < call[c.STEPS]:
        step_at = call[c.STEPS_AT] + 8 * r.FIELDS * s
        step = integers_at(step_at, r.FIELDS)
        joined = step[r.JOINED]
        all_items = step[r.ITEMS]
        if joined:
            all_items += integers_at(step_at + 8 * r.FIELDS, r.FIELDS)[r.ITEMS]
        finished = counters_at + 8 * c.COUNTER_STRIDE * s
        complete = complete or (load_acquire(gate) & (c.SHUT - 1)) == threads - 1
        shy = joined and complete
        for turn in range(queues):
            queue = (thread + turn) % queues
            _take(record_at, step_at, finished, queue, queues, shy and turn > 0, scratch_at, s)
        if timed:
            for row in range(s, s + 1 + joined):
                times[2 * row + 2] = now()
        if shy and not _reaches(finished, all_items):
            for queue in range(queues):
                _take(record_at, step_at, finished, queue, queues, False, scratch_at, s)
        wait(finished, all_items)
        if timed:
            for row in range(s, s + 1 + joined):
                times[2 * row + 3] = now()
        s += 1 + joined


@loop
def _clear(call: Any, queues: int) -> None:
    """Zero what a call has counted, while it is in near caches; Python took 40 microseconds."""
    left = call[c.COUNTERS_AT] + 8 * c.LINE
    store(left, 0)
    store(left + 8, 0)
    for s in range(call[c.STEPS]):
        finished = call[c.COUNTERS_AT] + 8 * (c.GATE + c.COUNTER_STRIDE * s)
        for line in range(1 + queues):
            store(finished + 8 * c.LINE * line, 0)


@loop
def _take(
    record_at: int, step_at: int, finished: int, queue: int, queues: int, leave: bool,
    scratch_at: int, s: int,
) -> None:  # fmt: skip
    """Compute the items of a queue, but not its rest where that is to be left."""
    step = integers_at(step_at, r.FIELDS)
    joined, items, more = step[r.JOINED], step[r.ITEMS], 0
    if joined:
        more = integers_at(step_at + 8 * r.FIELDS, r.FIELDS)[r.ITEMS]
    taken = finished + 8 * c.LINE * (1 + queue)
    first = _boundary(queue, queues, items, more, joined)
    end = _boundary(queue + 1, queues, items, more, joined)
    stop = end - first
    if leave:
        stop -= max(1, stop // REST)
    done = 0
    while not leave or load_acquire(taken) < stop:
        item = first + fetch_add(taken, 1)
        if item >= end:
            break
        beside = item >= items
        at = step_at + 8 * r.FIELDS * beside
        number = item - items * beside
        compute = integers_at(at, r.FIELDS)[r.COMPUTE]
        if status_of(compute, (record_at, at, number, scratch_at, s + beside)) != 0:
            # it counts as done, or the others would wait for it
            call = integers_at(record_at, c.FIELDS)
            store(call[c.COUNTERS_AT] + 8 * c.LINE + 8, 1)
        done += 1
    if done > 0:  # at once, for others read the line
        fetch_add(finished, done)


@loop
def _boundary(queue: int, queues: int, items: int, more: int, joined: int) -> int:
    """First item of a queue; those of a joined step are counted behind those of the first.

    Of an even number of queues each has half.
    """
    if not joined:
        return items * queue // queues
    if 2 * queue <= queues:
        return items * 2 * queue // queues
    return items + more * (2 * queue - queues) // queues


@loop
def _reaches(counter: int, count: int) -> bool:
    """Wait for a while until the number at an address reaches a count; return whether it does."""
    for _ in range(LONG):
        if load_acquire(counter) >= count:
            return True
        pause()
    return False


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
def _claim(record_at: int, gate: int, thread: int, number: int) -> bool:
    """Be this thread of a call, unless somebody else is: one who waited and one who was woken."""
    at = record_at + 8 * (c.FIELDS + thread * c.OWN_FIELDS + c.ENTERED)
    last = load_acquire(at)
    # who comes late for an old call must not undo the claim of a newer one: the gate is read behind
    if last == number or load_acquire(gate) >> 32 != number:
        return False
    return compare_exchange(at, last, number)


@loop
def _stay(record_at: int, thread: int, number: int) -> bool:
    """Wait for a while until the caller of the next call is there; return whether to help it.

    Whoever reads that this helper waits need not wake it. It leaves at once if one is wanted for
    another memory. It keeps its core from others meanwhile: with one that they hold for
    milliseconds, a caller that counts on it would be alone.
    """
    call = integers_at(record_at, c.FIELDS)
    if call[c.THREADS] > call[c.CORES]:  # it would keep its core from one that has work
        return False
    gate, pending, following = call[c.COUNTERS_AT], call[c.PENDING_AT], record_at + 8 * c.NEXT
    waiting = record_at + 8 * (c.FIELDS + thread * c.OWN_FIELDS + c.WAITING)
    start = now()
    if start == 0:  # no clock
        return False
    store(waiting, 1)
    turns = 0
    while (load_acquire(gate + 8) - number) % c.NUMBERS > c.NUMBERS // 2:  # the caller is behind
        pause()
        turns += 1
        if turns % 16 == 0:
            gone = now() - start
            wanted = load_acquire(pending) > load_acquire(pending + 8)
            if gone > call[c.STAY]:
                store(waiting, 0)
            if gone > call[c.STAY] + GRACE or (wanted and load_acquire(following) != number):
                store(waiting, 0)
                return False
    store(waiting, 0)
    return thread < call[c.THREADS]


@loop
def _enter(gate: int, call_number: int) -> bool:
    while True:
        state = load_acquire(gate)
        if state >> 32 != call_number or state & c.SHUT:
            return False
        if compare_exchange(gate, state, state + 1):
            return True

"""What the threads that run a program are given: a record of int64, and counters they share."""

from __future__ import annotations

# The record: addresses, and sizes in elements
STEPS_AT, STEPS = 0, 1  # the program
TABLES_AT, TABLES_SIZE = 2, 3  # int64: row tiles, part boundaries, phase shifts
MEMORY_AT, MEMORY_SIZE = 4, 5  # float32: all values
COUNTERS_AT = 6
INPUT_AT_AT, INPUT_SIZE = 7, 8  # where the address of the input stands; float32, contiguous
OUTPUT_AT_AT, OUTPUT_SIZE = 9, 10  # the same for the output
BATCH, THREADS = 11, 12
TIMES_ROWS = 13  # of what each thread notes; 0: nothing
PENDING_AT = 14  # int64: helpers that were asked for so far, helpers that came
NEXT = 15  # number of the call that was prepared last
CORES = 16  # how many the process may use
STAY = 17  # nanoseconds for which a helper that is done waits for the next call
FIELDS = 18

# Behind it, for each thread
SCRATCH_AT = 0  # memory of this thread alone
TIMES_AT = 1  # int64, two columns
WAITING = 2  # 1 while this helper waits for the next call
ENTERED = 3  # number of the last call that somebody entered as this thread
OWN_FIELDS = 4

# The counters
QUEUES = 8
"""Most queues that the items of a step are cut into; more threads than that share them."""

LINE = 8
"""int64 values of a cache line; every counter has one of its own."""

GATE = 2 * LINE
"""int64 values before the counters: the gate, and the number of the call whose caller is there; how
many helpers have left, and if an item failed."""

SHUT = 1 << 31
"""Bit of the gate. Below it, the helpers that entered; above it, the number of the call."""

NUMBERS = 1 << 31
"""Calls have numbers below this one, and begin again."""

COUNTER_STRIDE = LINE * (1 + QUEUES)
"""int64 counters of one step: finished items, then the items taken from every queue."""

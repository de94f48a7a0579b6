"""Helpers that wait for the next call: who stays, who is counted on, who leaves."""

from __future__ import annotations

import time
from contextlib import contextmanager
from threading import Thread

import numpy as np
import pytest
from bare import Helpers, engine_of
from models import Builder, randoms
from watch import Watch

from blocksparse.runtime.kernels import call_record as c

PATIENCE = 40
"""Seconds to wait for a helper while other processes hold the cores."""


def until(reached, complaint):
    """Wait for something that happens at once, but for other processes."""
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end, complaint
        time.sleep(0)


def entered(record, thread):
    """Number of the last call that somebody entered as this thread."""
    return record[c.FIELDS + thread * c.OWN_FIELDS + c.ENTERED]


class Patient(Watch):
    """Does not compute before all helpers are there."""

    def __init__(self, engine, batch, threads):
        super().__init__(engine, batch)
        self.helpers = range(1, threads)

    def compute(self, *arguments):
        record, number = self.memory._record, self.memory._number - 1
        until(lambda: all(entered(record, k) == number for k in self.helpers), "it never came")
        return super().compute(*arguments)


@contextmanager
def wanted():
    """As if helpers were asked for elsewhere, and had not come yet."""
    asked, came = Helpers.pending
    Helpers.pending[0] = came + 1000
    yield
    Helpers.pending[0] = asked


class Staying:
    """An engine whose helpers all come, and wait for the next call until they have to leave."""

    def __init__(self):
        b = Builder((8, 40, 40))
        b.conv(b.conv(b.conv("x", 24), 24), 24)
        self.engine, self.threads, self.asked = engine_of(b.model()), [], 0
        self.engine._helpers = self.helpers = Helpers(self.come)
        self.images = randoms(3, 8, 40, 40)

    def come(self, work, calls):
        self.asked += len(calls)
        started = [Thread(target=work, args=arguments) for arguments in calls]
        self.threads += started
        for thread in started:
            thread.start()
        for thread, _, number, (_, record, _) in calls:
            until(lambda t=thread, n=number, r=record: entered(r, t) == n, "a helper never came")

    def memory(self, threads):
        """Call, and return the memory of the call when all helpers wait for the next one."""
        self.engine.run(self.images, threads)
        (memory,) = self.engine._plan(len(self.images), threads).free
        until(lambda: not memory.missing(threads), "helpers never stay")
        return memory

    def leave(self):
        with wanted():
            for thread in self.threads:
                thread.join(PATIENCE)
                assert not thread.is_alive()


@pytest.fixture
def staying(monkeypatch):
    monkeypatch.setattr("blocksparse.runtime.calls.STAY", 600 * 10**9)
    # or three threads would not wait on two cores
    monkeypatch.setattr("blocksparse.runtime.calls.usable_cores", lambda: 3)
    staying = Staying()
    yield staying
    staying.leave()


@pytest.mark.parametrize("threads", [2, 3])
def test_a_helper_stays_for_the_next_call(staying, threads):
    """Whoever calls again at once need not wake it; it leaves when nobody calls."""
    expected = staying.engine.run(staying.images, 1)
    memory = staying.memory(threads)
    for _ in range(10):
        with Patient(staying.engine, len(staying.images), threads):
            outputs = staying.engine.run(staying.images, threads)
        assert staying.asked == threads - 1
        np.testing.assert_array_equal(outputs, expected)
        until(lambda: not memory.missing(threads), "helpers never stay")
    memory._record[c.STAY] = 0
    for thread in staying.threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert memory.missing(threads) == list(range(1, threads)), "they are counted on, and are gone"


@pytest.mark.parametrize("attempt", range(5))
def test_more_threads_while_a_helper_waits(staying, attempt):
    """It waits with a record that is too short for the next call, and leaves."""
    engine, others = staying.engine, randoms(*staying.images.shape, seed=1)
    expected = engine.run(others, 1)
    memory = staying.memory(2)
    short = memory._record
    engine._helpers = Helpers()  # nobody comes
    np.testing.assert_array_equal(engine.run(others, 3), expected)
    (gone,) = staying.threads
    gone.join(PATIENCE)
    assert not gone.is_alive()
    assert entered(short, 1) < memory._number - 1, "it came"
    engine._helpers = staying.helpers
    np.testing.assert_array_equal(engine.run(others, 3), expected)
    assert staying.asked == 3, "it is counted on, and is gone"


@pytest.mark.parametrize("attempt", range(5))
def test_fewer_threads_while_helpers_wait(staying, attempt):
    engine, others = staying.engine, randoms(*staying.images.shape, seed=1)
    expected = engine.run(others, 1)
    memory = staying.memory(3)
    np.testing.assert_array_equal(engine.run(others, 2), expected)
    until(lambda: 2 in memory.missing(3), "a third thread still waits")
    assert entered(memory._record, 2) < memory._number - 1, "a third thread came"


def test_a_helper_that_missed_its_call_leaves(staying):
    """It had no core meanwhile; who counts on it would be alone."""
    memory = staying.memory(2)
    (missed,) = staying.threads
    memory.counters[1] += 2  # the next call has its caller, and the one behind it
    missed.join(PATIENCE)
    assert not missed.is_alive()
    assert memory.missing(2) == [1]
    staying.engine.run(staying.images, 2)
    assert staying.asked == 2


def test_a_helper_that_is_counted_on_stays_while_others_are_woken(staying):
    engine, still = staying.engine, []
    first = Helpers(lambda work, calls: staying.come(work, [k for k in calls if k[0] == 1]))
    engine.run(staying.images, 3)  # makes room for three threads
    (memory,) = engine._plan(len(staying.images), 3).free

    def first_waits():
        engine.run(staying.images, 3)
        return entered(memory._record, 1) == memory._number - 1 and memory.missing(3) == [2]

    def wake(work, calls):
        assert [thread for thread, *_ in calls] == [2]
        with wanted():
            time.sleep(0.01)  # it sees that
            still.append(memory.missing(3) == [2])

    staying.leave()
    for _ in range(10):
        engine._helpers = first
        until(first_waits, "it never stays")
        engine._helpers = Helpers(wake)
        engine.run(staying.images, 3)
    assert still == [True] * 10

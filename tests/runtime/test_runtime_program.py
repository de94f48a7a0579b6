"""How threads share the items of a step: queues, helpers that come late or never, traces."""

from __future__ import annotations

import ctypes
import time
from contextlib import contextmanager
from functools import partial
from threading import Thread

import numpy as np
import pytest
from bare import Helpers, engine_of, shuffled
from models import POOL, Builder, randoms

from blocksparse.runtime.calls import CallMemory
from blocksparse.runtime.kernels import call_record as c
from blocksparse.runtime.kernels import records
from blocksparse.runtime.pieces import Piece

PATIENCE = 40
"""Seconds to wait for a helper while other processes hold the cores."""


@pytest.fixture(scope="module")
def network():
    """A network with steps of many kinds, some with fewer items than threads, and its answer."""
    b = Builder((8, 40, 40))
    x = b.conv("x", 24, layout=("bsr", (8, 8), 0.5))
    x = b.conv(x, 40, stride=(2, 2), layout=("bsr", (8, 8), 0.5))
    x = b.node("max_pool2d", x, dilation=(1, 1), **POOL)
    x = b.node("adaptive_avg_pool2d", b.conv(x, 40, residual=x), output_size=(1, 1))
    b.linear(b.node("flatten", x), 100)
    engine = engine_of(b.model())
    images = randoms(3, 8, 40, 40)
    return engine, images, engine.run(images, 1)


@pytest.fixture
def engine(network):
    """The network's engine, with its own helpers back in the end."""
    engine = network[0]
    kept = engine._helpers
    kept.close()  # nobody waits any more
    yield engine
    engine._helpers = kept


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


def test_a_system_that_gives_no_thread_leaves_the_work_to_the_caller(network, caplog, monkeypatch):
    """Told once, and asked again after `close`."""
    engine, x, expected = network
    engine.close()

    def refuse(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", refuse)
        for _ in range(3):
            np.testing.assert_array_equal(engine.run(x, 2), expected)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["going on with 1 of 2 threads: can't start new thread"]
    assert not engine._helpers._threads
    engine.close()
    np.testing.assert_array_equal(engine.run(x, 2), expected)
    assert len(engine._helpers._threads) == 1


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 8, 9, 20])
def test_helpers_that_never_come_leave_their_queues_to_the_caller(network, engine, threads):
    _, images, expected = network
    engine._helpers = Helpers()
    with Watch(engine, len(images)) as watch:
        np.testing.assert_array_equal(engine.run(images, threads), expected)
    assert len(engine._helpers.calls) == threads - 1
    watch.assert_order(0, min(threads, c.QUEUES))


@pytest.mark.parametrize("threads", [2, 5, 9, 20])
def test_a_helper_alone_does_everything(network, engine, threads):
    """Each thread number, also beyond the queues, finds every item; who comes later finds none."""
    _, images, expected = network
    for lonely in range(threads - 1):
        engine._helpers = Helpers(lambda work, calls, k=lonely: work(*calls[k]))
        with Watch(engine, len(images)) as watch:
            np.testing.assert_array_equal(engine.run(images, threads), expected)
        watch.assert_order(lonely + 1, min(threads, c.QUEUES))


def test_helpers_of_a_call_that_is_over_leave_the_next_one_alone(network, engine):
    _, images, answer = network
    others = randoms(*images.shape, seed=1)
    expected = engine.run(others, 1)
    engine._helpers = Helpers()
    returned = engine.run(images, 3)
    late = engine._helpers.calls
    engine._helpers = Helpers(lambda work, calls: [work(*arguments) for arguments in late])
    with Watch(engine, len(images)) as watch:
        np.testing.assert_array_equal(engine.run(others, 3), expected)
    watch.assert_order(0, 3)
    np.testing.assert_array_equal(returned, answer, "what was returned before stays")


def test_late_helpers_meet_a_finished_program(network, engine):
    _, images, expected = network
    late = []

    def act(work, calls):
        def wait(arguments):
            time.sleep(0.002 * len(late))
            work(*arguments)

        for arguments in calls:
            late.append(Thread(target=wait, args=(arguments,)))
            late[-1].start()

    engine._helpers = Helpers(act)
    with Watch(engine, len(images)):
        got = engine.run(images, 12)
        for thread in late:
            thread.join()
    np.testing.assert_array_equal(got, expected)


def test_two_who_come_as_the_same_thread(network, engine):
    """One that waited and one that was woken: the second finds that the first is there.

    Also if one that is late for an older call comes in between.
    """
    _, images, expected = network
    inside = []

    def act(work, calls):
        thread, at, number, (memory, *kept) = calls[0]
        for of_call in (number, number, number - 1, number):
            work(thread, at, of_call, (memory, *kept))
            inside.append(int(memory.counters[0] & (c.SHUT - 1)))

    engine._helpers = Helpers(act)
    np.testing.assert_array_equal(engine.run(images, 2), expected)
    assert inside == [1, 1, 1, 1]


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


@pytest.mark.parametrize("threads", [2, 3, 9, 17])
def test_more_threads_than_cores_and_queues(network, threads):
    engine, images, expected = network
    for _ in range(3):
        with Watch(engine, len(images)):
            np.testing.assert_array_equal(engine.run(images, threads), expected)


def test_counters_are_as_many_as_the_plan_says(network):
    engine, images, _ = network
    plan = engine._plan(len(images), 1).plan
    memory = CallMemory(plan, engine._helpers.pending)
    assert plan.counters == len(plan.records) * c.COUNTER_STRIDE
    assert len(memory.counters) == c.GATE + plan.counters
    assert c.GATE % c.LINE == 0
    assert memory.counters.ctypes.data % 64 == 0, "no counter shares its line"
    assert c.COUNTER_STRIDE == c.LINE * (1 + c.QUEUES)


def test_every_thread_has_scratch_memory_of_its_own(network):
    engine, images, _ = network
    plan = engine._plan(len(images), 1).plan
    memory = CallMemory(plan, engine._helpers.pending)
    places = [memory.scratch(thread) for thread in (2, 0, 1)]
    assert all(place % 64 == 0 for place in places)
    assert [memory.scratch(thread) for thread in (2, 0, 1)] == places
    for raw, _ in memory._scratch:
        start, end = raw.ctypes.data, raw.ctypes.data + raw.nbytes
        (place,) = (p for p in places if start <= p < end)
        assert place + plan.scratch <= end


def test_items_may_be_computed_in_any_order(network, engine):
    """One thread, all items of a step shuffled: an item depends on no other one of its step."""
    _, images, expected = network
    engine._helpers = Helpers()
    engine.run(images, 2)
    shuffled(engine._helpers.calls[0], expected)


def test_a_trace_says_who_worked(network, engine):
    """A helper that never came has zeros; one that did it all has what the caller has not."""
    _, images, expected = network
    engine._helpers = Helpers()
    output, trace = engine.timed_run(images, 3)
    np.testing.assert_array_equal(output, expected)
    assert trace.busy_ns.shape == (3, len(engine.steps.steps))
    assert not trace.busy_ns[1:].any()
    assert (trace.busy_ns[0] > 0).all()
    assert (trace.step_ns >= trace.busy_ns[0]).all()

    engine._helpers = Helpers(lambda work, calls: work(*calls[1]))
    output, trace = engine.timed_run(images, 3)
    np.testing.assert_array_equal(output, expected)
    assert not trace.busy_ns[1].any()
    assert trace.busy_ns[2].sum() > trace.busy_ns[0].sum()

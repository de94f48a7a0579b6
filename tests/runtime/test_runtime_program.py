"""How threads share the items of a step: queues, helpers that come late or never, traces."""

from __future__ import annotations

import ctypes
import time
from functools import partial
from threading import Thread

import numpy as np
import pytest
from bare import Helpers, engine_of, shuffled
from models import POOL, Builder, randoms

from blocksparse.runtime.calls import CallMemory
from blocksparse.runtime.kernels import call_record as c
from blocksparse.runtime.kernels import records
from blocksparse.runtime.limits import usable_cores
from blocksparse.runtime.pieces import Piece

PATIENCE = 40
"""Seconds to wait for helpers that wait for 0.4 ms, while other processes hold the cores."""


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


def test_a_helper_stays_for_the_next_call(network, engine):
    """Whoever calls again at once need not wake it; it leaves when nobody calls."""
    images, asked, threads = randoms(3, 8, 40, 40, seed=2), [], []
    expected = engine.run(images, 1)

    def act(work, calls):
        asked.append(len(calls))
        threads.append(Thread(target=work, args=calls[0]))
        threads[-1].start()

    engine._helpers = Helpers(act)
    calls, end = 0, time.monotonic() + PATIENCE
    while calls - len(asked) < 5:
        outputs = [engine.run(images, 2) for _ in range(4)]  # to compare between takes too long
        with Watch(engine, len(images)):
            outputs.append(engine.run(images, 2))
        for output in outputs:
            np.testing.assert_array_equal(output, expected)
        calls += len(outputs)
        assert time.monotonic() < end, "every call had to wake a helper"
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


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


def until_all_wait(engine, x, threads):
    """Call again and again until all helpers wait for the next call; return the memory of it."""
    enough = usable_cores() >= threads
    end = time.monotonic() + (PATIENCE if enough else 5)
    while time.monotonic() < end:
        engine.run(x, threads)
        (memory,) = engine._plan(len(x), threads).free
        for _ in range(10):
            if not memory.missing(threads):
                return memory
            time.sleep(0)
    if not enough:  # with one core for two, who is done waits for who has none
        pytest.skip("helpers were never there together: too few cores, and others hold them")
    raise AssertionError("helpers never stay")


@pytest.fixture
def waited_for(monkeypatch):
    """An engine of its own, images, and what comes out with any number of threads.

    Nobody tells helpers that wait of others that are asked for.
    """
    monkeypatch.setattr("blocksparse.runtime.calls.usable_cores", lambda: 3)
    b, threads = Builder((8, 40, 40)), []
    b.conv(b.conv(b.conv("x", 24), 24), 24)
    engine, images = engine_of(b.model()), [randoms(3, 8, 40, 40, seed=seed) for seed in range(2)]

    def act(work, calls):
        threads.extend(Thread(target=work, args=arguments) for arguments in calls)
        for thread in threads[-len(calls) :]:
            thread.start()

    engine._helpers = Helpers(act)
    yield engine, images, engine.run(images[1], 1)
    for thread in threads:
        thread.join(20)


@pytest.mark.parametrize("attempt", range(5))
def test_more_threads_while_a_helper_waits(waited_for, attempt):
    """It waits with a record that is too short for the next call, and leaves."""
    engine, images, expected = waited_for
    memory = until_all_wait(engine, images[0], 2)
    short, helpers = memory._record, engine._helpers
    engine._helpers = Helpers()  # to start threads takes longer than it waits
    np.testing.assert_array_equal(engine.run(images[1], 3), expected)
    engine._helpers = helpers
    entered = c.FIELDS + c.OWN_FIELDS + c.ENTERED
    assert short[entered] < memory._number - 1, "it came"
    before, end = memory._record[entered], time.monotonic() + PATIENCE
    while time.monotonic() < end:
        engine.run(images[1], 3)
        if memory._record[entered] > before:
            return
    raise AssertionError("it is counted on, and is gone")


@pytest.mark.parametrize("attempt", range(5))
def test_fewer_threads_while_helpers_wait(waited_for, attempt):
    engine, images, expected = waited_for
    memory = until_all_wait(engine, images[0], 3)
    np.testing.assert_array_equal(engine.run(images[1], 2), expected)
    entered = memory._record[c.FIELDS + 2 * c.OWN_FIELDS + c.ENTERED]
    assert entered < memory._number - 1, "a third thread came"


def test_a_helper_that_is_counted_on_stays_while_others_are_woken(waited_for):
    engine, images, expected = waited_for
    first = Helpers(lambda work, calls: start([call for call in calls if call[0] == 1]))

    def start(calls):
        for call in calls:
            Thread(target=engine._help, args=call).start()

    def wake(work, calls):
        Helpers.pending[0] += 1000
        end = time.perf_counter() + 50e-6
        while time.perf_counter() < end:
            pass

    came = 0
    for _ in range(20):
        engine._helpers = first
        while True:
            engine.run(images[0], 3)
            (memory,) = engine._plan(len(images[0]), 3).free
            if memory.missing(3) == [2]:
                break
        engine._helpers = Helpers(wake)
        number = memory._number
        np.testing.assert_array_equal(engine.run(images[1], 3), expected)
        came += memory._record[c.FIELDS + c.OWN_FIELDS + c.ENTERED] == number
        Helpers.pending[0] -= 1000
    assert came > 10


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

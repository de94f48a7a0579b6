"""How threads share the items of a step: queues, helpers that come late or never, traces."""

from __future__ import annotations

import time
from threading import Thread

import numpy as np
import pytest
from bare import Helpers, engine_of, shuffled
from models import POOL, Builder, randoms
from watch import Watch

from blocksparse.runtime.calls import CallMemory
from blocksparse.runtime.kernels import call_record as c


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

"""Threads that take whole parts of a batch."""

from __future__ import annotations

import threading

import pytest

from blocksparse.runtime.helpers import Helpers
from blocksparse.runtime.streams import Streams

PARTS = [slice(i, i + 1) for i in range(12)]


@pytest.fixture
def streams():
    made = Streams()
    yield made
    made.close()


@pytest.mark.parametrize("threads", [2, 5])
def test_every_part_is_done_once(streams, threads):
    done = []
    for _ in range(50):
        streams.run(lambda part, thread: done.append((part.start, thread)), PARTS, threads)
        assert sorted(part for part, _ in done) == list(range(12))
        assert {thread for _, thread in done} <= set(range(threads))
        done.clear()


def test_parts_are_done_at_the_same_time(streams):
    meeting = threading.Barrier(3)
    streams.run(lambda part, thread: meeting.wait(20), PARTS[:3], 3)


@pytest.mark.parametrize("where", [0, 1])
def test_what_a_part_raises_reaches_the_caller(streams, where):
    """Whichever thread it was; nothing is begun any more, and the next call works."""
    ended = threading.Event()
    timer = threading.Timer(0.3, ended.set)  # by then it has told of its error
    meeting = threading.Barrier(2, action=timer.start)
    begun = []

    def work(part, thread):
        begun.append(part)
        if part.start < 2:
            meeting.wait(20)  # both threads are at it
            if thread == where:
                raise MemoryError("no place")
            ended.wait(20)

    with pytest.raises(MemoryError, match="no place"):
        streams.run(work, PARTS, 2)
    timer.join()
    assert len(begun) == 2
    done = []
    streams.run(lambda part, thread: done.append(part), PARTS, 2)
    assert sorted(part.start for part in done) == list(range(12))


def test_helpers_that_never_come(streams, monkeypatch):
    monkeypatch.setattr(Helpers, "start", lambda *_: None)
    done = []
    streams.run(lambda part, thread: done.append((part, thread)), PARTS, 4)
    assert done == [(part, 0) for part in PARTS]


def test_a_helper_that_comes_late_finds_nothing(streams, monkeypatch):
    late = []
    monkeypatch.setattr(Helpers, "start", lambda _, work, numbers: late.append((work, numbers)))
    done = []
    streams.run(lambda part, thread: done.append(part), PARTS, 2)
    ((work, numbers),) = late
    work(*numbers)
    assert done == PARTS


def test_closed_threads_end_and_come_back(streams):
    names = set()
    meeting = threading.Barrier(2)

    def work(part, thread):
        meeting.wait(20)
        names.add(threading.current_thread())

    streams.run(work, PARTS[:2], 2)
    (helper,) = names - {threading.current_thread()}
    streams.close()
    assert not helper.is_alive()
    streams.run(work, PARTS[:2], 2)
    assert len(names) == 3

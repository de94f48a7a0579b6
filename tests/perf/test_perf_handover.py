"""The time of a line of memory from one core to another."""

from __future__ import annotations

import threading
import time

import pytest

from benchmarks import handover as module
from benchmarks.handover import handover
from blocksparse.perf import usable_cores

pytestmark = pytest.mark.skipif(usable_cores() < 2, reason="takes two cores")


def test_a_line_goes_to_and_fro_as_often_as_asked():
    handover(10)  # compiles
    threads = threading.active_count()
    start = time.perf_counter()
    nanoseconds = handover(3000)
    seconds = time.perf_counter() - start
    assert nanoseconds > 1
    assert 2 * 3000 * nanoseconds < 1e9 * seconds
    assert threading.active_count() == threads


def test_a_line_that_was_lost_is_an_error(monkeypatch):
    def once(at, before, turns, side):
        """Neither waits for the other."""
        return 1

    monkeypatch.setattr(module, "_bounce", once)
    with pytest.raises(RuntimeError, match="handed over 0 times, not 30"):
        handover(10)

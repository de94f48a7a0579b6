"""What the notes of threads say about steps."""

from __future__ import annotations

import numpy as np
import pytest

from blocksparse.runtime.trace import trace

STEPS = ["a", "b", "c"]
ALONE = np.arange(3)


def notes(*rows):
    """One thread's (own part done, seen done) after the start and after each step."""
    return np.array(rows, np.int64)


WORKING = notes((100, 100), (150, 160), (190, 200), (280, 300))


def test_one_thread():
    result = trace(STEPS, ALONE, [WORKING])
    assert result.step_ns.tolist() == [60, 40, 100]
    assert result.busy_ns.tolist() == [[50, 30, 80]]


@pytest.mark.parametrize("late_first", [True, False])
def test_a_thread_that_lost_its_core_does_not_change_when_steps_ended(late_first):
    """It worked on the first step, was away, found the second done, and helped with the third."""
    late = notes((100, 100), (155, 195), (210, 212), (290, 300))
    threads = [late, WORKING] if late_first else [WORKING, late]
    result = trace(STEPS, ALONE, threads)
    assert result.step_ns.tolist() == [60, 40, 100]
    assert sorted(result.busy_ns.tolist()) == [[50, 30, 80], [55, 5, 78]]


def test_a_thread_that_slept_through_all_leaves_no_step_without_time():
    late = notes((400, 400), (401, 402), (403, 404), (405, 406))
    result = trace(STEPS, ALONE, [late, WORKING])
    assert result.step_ns.tolist() == [60, 40, 100]
    assert result.busy_ns.tolist() == [[0, 0, 0], [50, 30, 80]]


def test_a_helper_that_never_came():
    result = trace(STEPS, ALONE, [WORKING, np.zeros_like(WORKING)])
    assert result.step_ns.tolist() == [60, 40, 100]
    assert result.busy_ns.tolist() == [[50, 30, 80], [0, 0, 0]]


def test_halves_count_to_the_step_they_belong_to():
    """Two halves are done at once, and what they read of each other was copied before."""
    result = trace(["a", "b"], np.array([0, 1, 1]), [WORKING])
    assert result.step_ns.tolist() == [60, 140]
    assert result.busy_ns.tolist() == [[50, 110]]

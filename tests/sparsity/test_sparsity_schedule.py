"""Schedules: their ends, their shape, and what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksparse.sparsity import Cubic, Linear, OneShot, Steps

fractions = st.floats(0.0, 1.0)


@given(st.sampled_from([Cubic, Linear]), fractions, fractions, fractions, fractions)
def test_ramps_rise_from_none_to_all(kind, one, other, early, late):
    start, end = sorted((one, other))
    early, late = sorted((early, late))
    ramp = kind(start, end)
    assert 0.0 <= ramp.at(early) <= ramp.at(late) <= 1.0
    assert ramp.at(end) == 1.0
    if start < end:
        assert ramp.at(start) == 0.0


def test_cubic_is_the_published_curve():
    ramp = Cubic(0.1, 0.5)
    for progress in (0.15, 0.2, 0.3, 0.45):
        t = (progress - 0.1) / 0.4
        # s_f + (s_i - s_f)(1 - t)^3 with s_i = 0.2 and s_f = 0.8
        published = 0.8 + (0.2 - 0.8) * (1 - t) ** 3
        assert 0.2 + (0.8 - 0.2) * ramp.at(progress) == pytest.approx(published, abs=1e-12)


def test_one_shot_does_all_at_once():
    assert OneShot().at(0.0) == 1.0
    assert OneShot(start=0.3).at(0.29) == 0.0
    assert OneShot(start=0.3).at(0.3) == 1.0


@pytest.mark.parametrize(("start", "end"), [(-0.1, 0.5), (0.6, 0.5), (0.0, 1.1)])
def test_ramps_outside_the_training_are_refused(start, end):
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        Cubic(start, end)


@given(fractions, fractions, st.integers(1, 12))
def test_steps_are_equal_and_equally_far_apart(one, other, count):
    start, end = sorted((one, other))
    ramp = Steps(start, end, count)
    length = end - start
    for step in range(1, count + 1):
        before, after = ((step - rest) / count * length + start for rest in (0.1, -0.1))
        if length > 1e-3:
            assert ramp.at(before) == pytest.approx((step - 1) / count)
            assert ramp.at(after) == pytest.approx(step / count)
    assert ramp.at(end) == 1.0


def test_a_step_comes_on_time_whatever_the_rounding():
    assert [Steps(0.0, 1.0, 10).at(step / 10) for step in range(11)] == [k / 10 for k in range(11)]
    with pytest.raises(ValueError, match="at least 1"):
        Steps(count=0)

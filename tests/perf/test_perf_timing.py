from __future__ import annotations

import gc
import time

import pytest

from blocksparse.perf.timing import Timing, interleave


class Clock:
    """A clock that only naps move on: others may hold the cores."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def nap(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("blocksparse.perf.timing.time", clock)
    return clock


def test_summary_is_the_quartiles_in_milliseconds():
    timing = Timing.of([0.001, 0.005, 0.002, 0.004, 0.003])
    assert timing.median_ms == pytest.approx(3.0)
    assert timing.q1_ms == pytest.approx(2.0)
    assert timing.q3_ms == pytest.approx(4.0)
    assert timing.best_ms == pytest.approx(1.0)
    assert timing.rounds == 5
    assert str(timing) == "3 ms (2 to 4)"


def test_summary_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one duration"):
        Timing.of([])


def test_candidates_take_turns_and_the_order_is_reversed():
    calls: list[str] = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleave(candidates, rounds=2)
    assert list(timings) == ["a", "b", "c"]
    assert "".join(calls) == "aabbcc" + "ccbbaa"  # the untimed call, then the timed one
    assert all(timing.rounds == 2 for timing in timings.values())


def test_only_the_second_call_of_a_turn_is_timed(clock):
    state = {"first": True}

    def slow_first() -> None:
        clock.nap(0.05 if state["first"] else 0.01)
        state["first"] = not state["first"]

    timing = interleave({"slow_first": slow_first}, rounds=3)["slow_first"]
    assert (timing.best_ms, timing.q3_ms) == pytest.approx((10, 10))


def test_untimed_calls_go_on_until_it_has_settled(clock):
    seconds: list[float] = []

    def nap() -> None:
        seconds.append(0.0021)
        clock.nap(0.0021)

    timing = interleave({"nap": nap}, rounds=2, settle=0.02)["nap"]
    assert timing.rounds == 2
    assert len(seconds) == 22  # ten naps that are not timed, and one that is, twice


def test_slower_candidate_is_reported_slower():
    timings = interleave(
        {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}, rounds=3
    )
    assert timings["long"].best_ms >= 10
    assert 1 <= timings["short"].best_ms < timings["long"].best_ms


def test_goes_on_until_enough_seconds_were_timed(clock):
    timing = interleave({"nap": lambda: clock.nap(0.005)}, rounds=1, min_seconds=0.029)["nap"]
    assert timing.rounds == 6


def test_progress_rises_to_one():
    shares: list[float] = []
    interleave({"nothing": lambda: None}, rounds=4, on_round=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_collector_is_back_on_after_an_error():
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave({"broken": lambda: 1 // 0})
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"candidates": {}, "rounds": 1}, "nothing to time"),
        ({"candidates": {"a": int}, "rounds": 0}, "rounds is 0"),
    ],
)
def test_senseless_arguments_are_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        interleave(**arguments)

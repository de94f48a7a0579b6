"""The measurement of what pruning adds to a step: what it times, and what it prints."""

from __future__ import annotations

import pytest

from benchmarks.fits import Steps, fit
from benchmarks.training_overhead import main


def test_every_step_but_the_first_is_timed_and_updates_are_told_apart(tmp_path):
    steps = fit("resnet20", 32, 2, 8, 0.5, 3, str(tmp_path))
    assert len(steps.updated) == 3  # after 3 and 6 steps, and the last
    assert len(steps.masked) == len(steps.whole) == 4
    # the least of each: a single step on a busy machine takes any time
    assert min(steps.updated) > min(steps.masked) > 0
    assert all(part < whole for part, whole in zip(steps.masked, steps.whole, strict=True))


def test_without_pruning_only_whole_steps_are_timed(tmp_path):
    steps = fit("resnet20", 32, 2, 3, 0.0, 3, str(tmp_path))
    assert (len(steps.whole), steps.masked, steps.updated) == (2, [], [])


def test_command(capsys):
    assert main(["--model", "resnet20", "--image", "32", "--batch", "2", "--steps", "7"]) == 0
    printed = capsys.readouterr().out
    assert "pruning adds" in printed
    assert "masks built anew" in printed


def test_what_an_update_takes_is_printed_whole_and_spread_in_the_sum(monkeypatch, capsys):
    steps = Steps(whole=[1.0] * 3, masked=[0.01] * 3, updated=[0.51] * 3)
    monkeypatch.setattr("benchmarks.fits.fit", lambda *arguments: steps)
    assert main(["--interval", "50"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "pruning adds 2.00 % to a step: 10.0 ms for the masks" in printed
    assert "500.0 ms for an update, spread over 50 steps" in printed


@pytest.mark.parametrize("arguments", ["--steps 5", "--sparsity 0"])
def test_nothing_to_measure_is_said(arguments, capsys):
    assert main(["--model", "resnet20", *arguments.split()]) == 2
    assert "nothing to measure" in capsys.readouterr().err

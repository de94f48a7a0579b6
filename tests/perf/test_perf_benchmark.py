"""The script behind the published figures, run small, and the claim it was written for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sparse_vs_dense.py"


def measure(folder, *options):
    command = [sys.executable, str(SCRIPT), "--output", str(folder), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    [page], [facts] = folder.glob("*.md"), folder.glob("*.json")
    return page.read_text(), json.loads(facts.read_text())


@pytest.mark.slow
def test_results_hold_what_was_measured(tmp_path):
    options = ("--model", "resnet18", "--image", "64", "--rounds", "2", "--threads", "1")
    page, facts = measure(tmp_path, *options, "--sparsity", "0.5", "--batch", "3")
    assert facts["setting"]["threads"] == 1
    for name, timing in facts["timings"].items():
        assert f"| {name} | {timing['median_ms']:.2f} |" in page
        assert timing["rounds"] == 2
    dense, sparse = facts["files"]["dense"], facts["files"]["sparse"]
    assert dense["flops_kept"] == dense["flops"] == sparse["flops"]
    assert 0.5 < sparse["flops_kept"] / sparse["flops"] < 0.6  # the first convolution stays dense
    assert sparse["bytes"] < 0.6 * dense["bytes"]
    assert all(0 < file["max_error"] <= file["tolerance"] for file in (dense, sparse))


@pytest.mark.slow
def test_resnet50_at_75_percent_is_twice_as_fast_as_dense_eager(tmp_path):
    _, facts = measure(tmp_path, "--rounds", "10")
    assert facts["setting"]["model"] == "resnet50"
    assert facts["setting"]["sparsity"] == 0.75
    assert facts["speedup"] >= 2

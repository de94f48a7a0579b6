"""Two processes that train together: the command starts the second, and only the first reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blocksparse.sparsity import checkpoint_masks

ROOT = Path(__file__).resolve().parents[1]


def train(*overrides: str, cwd: Path) -> str:
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=env, text=True, timeout=300, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.long
def test_two_processes_make_one_run_and_go_on_with_it(tmp_path: Path) -> None:
    two = ["trainer=cpu", "trainer.devices=2", "trainer.limit_train_batches=5"]
    short = ["dense.epochs=1", "sparse.epochs=1", "report.rounds=3", "model.widths=[8,16,32]"]
    calibrated = ["calibration=obs", "calibration.images=64", "permutation=greedy"]
    out = train("experiment=smoke", *two, *short, *calibrated, "sparsity.target=0.4", cwd=tmp_path)
    assert out.count("Written to runs/smoke/") == 1
    assert "sync_dist" not in out
    (report,) = tmp_path.glob("runs/smoke/*/report.json")
    figures = json.loads(report.read_text())
    assert figures["accuracy"]["sparse"] == figures["accuracy"]["runtime"]
    checkpoints = report.parent / "checkpoints"
    sparse = torch.load(checkpoints / "sparse.ckpt", weights_only=True)
    masks = checkpoint_masks(sparse)
    assert masks
    for name, mask in masks.items():
        assert not sparse["state_dict"][name][~mask].any()
    (checkpoints / "sparse.ckpt").unlink()
    out = train(f"resume={report.parent}", cwd=tmp_path)
    again = torch.load(checkpoints / "sparse.ckpt", weights_only=True)
    for name, value in sparse["state_dict"].items():
        assert torch.equal(again["state_dict"][name], value), name

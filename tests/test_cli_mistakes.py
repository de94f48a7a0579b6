"""What is typed or plugged together wrongly: an error that says so, before the work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import call, small_model

from blocksparse.format.writer import write


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.bsr.safetensors"
    write(path, small_model())
    return path


@pytest.mark.parametrize("arguments", [["info", ""], ["run", "FILE", ""]])
def test_an_empty_name_is_not_the_current_folder(file, capsys, arguments):
    status, _, error = call(capsys, *(str(file) if a == "FILE" else a for a in arguments))
    assert status == 2
    assert "has an empty name" in error


@pytest.mark.parametrize("command", ["bench", "what-if"])
def test_a_place_to_save_at_that_cannot_be_is_said_before_the_work(file, tmp_path, capsys, command):
    status, _, error = call(capsys, command, str(file), "--save", str(tmp_path))
    assert status == 2
    assert f"{tmp_path} is a folder; name the file" in error


def test_an_output_that_is_not_finite_is_no_prediction(file, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.full((3, 12, 12), 3e38, np.float32))
    status, out, error = call(capsys, "run", str(file), str(tmp_path / "a.npy"))
    assert (status, out) == (1, "")
    assert "a.npy: the network's output is not finite" in error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_closed_or_full_outputs_are_no_traceback(file):
    base = f'"{sys.executable}" -m blocksparse.cli'
    closed = subprocess.run(f"{base} info {file} >&-", shell=True, capture_output=True, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")
    full = subprocess.run(
        f"{base} --version >/dev/full", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in full.stderr
    assert "No space left" in full.stderr

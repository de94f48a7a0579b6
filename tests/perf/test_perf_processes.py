"""What fresh processes cost: measured in the child, whatever the parent has in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import memory, startup
from benchmarks.processes import PEAK, ChildError, child

GOLDEN = Path(__file__).parents[1] / "golden" / "v1.bsr.safetensors"
SCRIPTS = (
    "compare", "memory", "smoothness", "startup", "training_overhead", "training_speed",
)  # fmt: skip
REPORT = f"{PEAK}\nimport json, sys\nblock = b'x' * int(sys.argv[1])\n"
REPORT += "print(json.dumps({'peak': peak_bytes()}))"


def test_peak_is_the_childs_own():
    ballast = b"x" * 300_000_000  # getrusage of a child would count what its parent had
    small, large = (child(REPORT, str(count))["peak"] for count in (0, 100_000_000))
    assert len(ballast) > 10 * small
    assert 95e6 < large - small < 105e6


def test_child_that_fails_says_why():
    with pytest.raises(ChildError, match="ValueError: the reason"):
        child("raise ValueError('the reason')")


def test_environment_reaches_the_child():
    program = "import json, os; print(json.dumps({'a': float(os.environ['A'])}))"
    assert child(program, environment={"A": "2.5"}) == {"a": 2.5}


def test_parts_of_a_start_add_up():
    parts = startup.process(GOLDEN, threads=1)
    both = parts["load the file"] + parts["first image"]
    assert parts["load and first image"] == pytest.approx(both)
    assert parts[startup.WHOLE] > parts["import blocksparse"] + both > 0


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["onnxruntime", "onnx"])
def test_memory_is_shown_without_the_peer(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(memory, "child", lambda *arguments: {"peak": 2e6})
    assert memory.main(["--model", "resnet8", "--runs", "1"]) == 0
    out = capsys.readouterr().out
    assert "blocksparse, sparse" in out
    assert "onnxruntime, dense" not in out
    assert "onnxruntime is left out: " in out
    assert 'pip install -e ".[bench]"' in out


@pytest.mark.slow
def test_startup_needs_no_onnx(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(startup, "child", lambda *arguments, **options: {"load the file": 1.0})
    assert startup.main(["--model", "resnet8", "--runs", "1", "--first-runs", "1"]) == 0
    assert "resnet8, 75 % sparse" in capsys.readouterr().out


def test_without_pytorch_every_script_says_what_to_add():
    program = (
        "import importlib, json, sys\n"
        "sys.modules['torch'] = None\n"  # what import does where it is missing
        "scripts = {name: importlib.import_module('benchmarks.' + name) for name in sys.argv[1:]}\n"
        "print(json.dumps({name: script.main([]) for name, script in scripts.items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *SCRIPTS],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == set(SCRIPTS)
    assert all(json.loads(done.stdout).values())  # none says that it did its work
    assert done.stderr.count('add it with: pip install -e ".[bench]"') == len(SCRIPTS)


@pytest.mark.long
def test_first_time_compiles():
    startup.process(GOLDEN, threads=1)
    cached, first = startup.process(GOLDEN, 1), startup.first_ever(GOLDEN, 1)
    assert first["load and first image"] > 2 * cached["load and first image"]


@pytest.mark.long
@pytest.mark.parametrize("script", [memory, startup])
def test_scripts_show_their_table(script, capsys):
    options = ["--model", "resnet8", "--runs", "1", "--threads", "1"]
    assert script.main(options) == 0
    out = capsys.readouterr().out
    assert "resnet8, 75 % sparse" in out
    assert ("onnxruntime, dense" in out) == (script is memory)

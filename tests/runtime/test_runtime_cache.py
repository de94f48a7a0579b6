"""What is kept on disk: code that runs without its compilers, and measured layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blocksparse.runtime.algorithms import Memory
from blocksparse.runtime.kernels import elf
from blocksparse.runtime.kernels.cache import cache_folder
from blocksparse.runtime.kernels.target import host

GOLDEN = Path(__file__).parents[1] / "golden" / "v1.bsr.safetensors"

PROGRAM = """
import logging, sys
logging.basicConfig()
import numpy as np, blocksparse
network = blocksparse.load(sys.argv[1], engine="compiled", threads=2)
images = np.random.default_rng(0).standard_normal((1, *network.input_shape), np.float32)
print(network(images).sum(), *sorted({"numba", "llvmlite"} & set(sys.modules)))
"""


def run(cache, **environment):
    """Run the golden file in a fresh process; return what it printed and what it logged."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(GOLDEN)],
        env={**os.environ, "BLOCKSPARSE_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"7", b'{"a": 1}', b'{"a": null}', b'{"a": {"direct": "fast"}}',
        b'{"a": {"direct": [1]}}', b"\xff\xfe\0", b'{"a": {"direct": null}}',
    ],
)  # fmt: skip
def test_damaged_measurements_are_ignored_and_replaced(tmp_path, monkeypatch, content):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path))
    memory, times = Memory(host()), {"key": {"direct": 1.5}}
    memory.path.write_bytes(content)
    assert memory.read() == {}
    memory.write(times)
    assert memory.read() == times
    assert json.loads(memory.path.read_text()) == times
    assert list(tmp_path.iterdir()) == [memory.path], "nothing else is left behind"


def test_measurements_lie_beside_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path / "kept" / "here"))
    memory = Memory(host())
    memory.write({"key": {"direct": 1.0}})
    assert memory.path.parent == tmp_path / "kept" / "here"
    assert Memory(host()).read() == {"key": {"direct": 1.0}}


@pytest.mark.skipif(not elf.SUPPORTED, reason="LLVM links here")
def test_a_process_that_finds_its_kernels_imports_no_compiler():
    run(cache_folder())  # whatever is not there yet
    (_, *compilers), said = run(cache_folder())
    assert compilers == []
    assert said == ""


@pytest.mark.slow
def test_what_is_kept_runs_without_the_compilers(tmp_path):
    """The first process compiles and says so; the second has the same bits and no Numba."""
    (first, *compilers), said = run(tmp_path)
    assert compilers == ["llvmlite", "numba"]
    assert said.count("compiles its kernels") == 1
    (second, *compilers), said = run(tmp_path)
    assert second == first
    assert said == ""
    if elf.SUPPORTED:
        assert compilers == []
        damaged = min(tmp_path.glob("blocksparse_run-*.o"))
        damaged.write_bytes(damaged.read_bytes()[:-100])
        (third, *_), said = run(tmp_path)
        assert third == first
        assert "compiles its kernels" in said
    (other, *_), said = run(tmp_path, NUMBA_CPU_NAME="generic")
    assert float(other) == pytest.approx(float(first), rel=1e-4)
    assert "compiles its kernels" in said, "another processor has objects of its own"


@pytest.mark.slow
def test_without_a_writable_cache_everything_still_runs(tmp_path):
    (tmp_path / "file").write_text("")
    _, said = run(tmp_path / "file")
    assert "BLOCKSPARSE_CACHE" in said
    assert (tmp_path / "file").read_text() == ""

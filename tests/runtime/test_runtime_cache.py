"""What is kept on disk: measured layers, damaged or not; and where Numba can keep nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blocksparse.runtime.algorithms import Memory
from blocksparse.runtime.kernels import forget_stale
from blocksparse.runtime.kernels.target import host

GOLDEN = Path(__file__).parents[1] / "golden" / "v1.bsr.safetensors"

PROGRAM = """
import logging, sys
from numba.core import caching, config
logging.basicConfig()
locators = caching.CacheImpl._locator_classes

def refuse(cls, py_func, py_file):
    return None

for locator in locators:
    if "UserProvided" not in locator.__name__:  # the one that NUMBA_CACHE_DIR steers
        locator.from_function = classmethod(refuse)
config.CACHE_DIR = ""
import numpy as np, blocksparse
network = blocksparse.load(sys.argv[1], engine="compiled")
print(network.engine, network(np.zeros((1, *network.input_shape), np.float32)).shape)
"""


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


@pytest.mark.slow
def test_without_a_writable_cache_everything_still_runs():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(GOLDEN)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "compiled engine" in done.stdout
    assert "NUMBA_CACHE_DIR" in done.stderr


def test_loops_kept_from_other_sources_are_forgotten(tmp_path):
    kept = tmp_path / "__pycache__"
    kept.mkdir()
    (tmp_path / "a.py").write_text("")
    (tmp_path / "b.py").write_text("")
    index, code = kept / "a.f-1.py311.nbi", kept / "a.f-1.py311.1.nbc"

    def compiled():
        index.write_bytes(b"i")
        code.write_bytes(b"c")

    compiled()
    forget_stale(tmp_path)  # nobody knows what they were compiled from
    assert not index.exists()
    compiled()
    forget_stale(tmp_path)
    assert index.exists()
    assert code.exists()
    (tmp_path / "b.py").write_text("X = 1")  # not the file of the kept function
    forget_stale(tmp_path)
    assert not index.exists()
    assert not code.exists()

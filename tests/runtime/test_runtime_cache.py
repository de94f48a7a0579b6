"""Where Numba can keep nothing: the runtime compiles in every process, and says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_without_a_writable_cache_everything_still_runs():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(GOLDEN)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "compiled engine" in done.stdout
    assert "NUMBA_CACHE_DIR" in done.stderr

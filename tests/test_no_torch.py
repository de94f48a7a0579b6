"""A machine that only runs models needs none of the training libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden" / "v1.bsr.safetensors"

# Stands before the code of every test: importing one of these, or a part of one, raises.
BLOCK = """
import sys

class Blocker:
    names = {
        "torch", "torchvision", "lightning", "pytorch_lightning", "hydra", "sklearn", "scipy",
        "safetensors",
    }

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked in this test")

sys.meta_path.insert(0, Blocker())
"""


def run(code: str, *arguments: object) -> str:
    """Run code in a fresh process with the training libraries blocked; return what it printed."""
    command = [sys.executable, "-c", BLOCK + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["torch", "lightning.pytorch", "hydra", "scipy.sparse"])
def test_the_block_blocks(name):
    code = f"""
try:
    import {name}
except ImportError as error:
    print("blocked" if "is blocked in this test" in str(error) else error)
"""
    assert run(code) == "blocked\n"


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_an_exported_model_runs(engine):
    code = """
import blocksparse, numpy as np
from blocksparse.runtime.tolerance import tolerance
golden = np.load(sys.argv[2])
network = blocksparse.load(sys.argv[1], engine=sys.argv[3])
logits = network(golden["x"])
allowed = tolerance(network.model, abs(golden["logits"]).max())
np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=allowed)
print(logits.shape[0], len(golden["x"]))
"""
    images, expected = run(code, GOLDEN, GOLDEN.with_name("v1.npz"), engine).split()
    assert images == expected != "0"


@pytest.mark.parametrize(
    "arguments",
    [
        ("info",),
        ("info", "--explain"),
        ("verify",),
        ("bench", "--rounds", "1"),
        ("what-if", "--rounds", "1", "--pattern", "block2x2"),
    ],
    ids=" ".join,
)
def test_the_command_line_runs(arguments):
    code = "from blocksparse.cli import main; sys.exit(main(sys.argv[1:]))"
    assert "v1.bsr.safetensors" in run(code, arguments[0], GOLDEN, *arguments[1:])


def test_prediction_needs_no_training_library(tmp_path):
    code = """
import blocksparse, numpy as np
from blocksparse.cli import main
shape = blocksparse.read(sys.argv[1]).input_shape
np.save(sys.argv[2], np.zeros((2, *shape), np.float32))
sys.exit(main(["run", *sys.argv[1:], "--top", "1"]))
"""
    assert "zeros.npy[1]" in run(code, GOLDEN, tmp_path / "zeros.npy")


def test_a_network_by_name_asks_for_the_training_libraries(tmp_path):
    code = """
import contextlib, io
from blocksparse.pipeline.untrained import main
with contextlib.redirect_stderr(io.StringIO()) as said:
    status = main(["resnet50", sys.argv[1]])
print(status, said.getvalue())
"""
    said = run(code, tmp_path / "model.bsr.safetensors")
    assert said.startswith("1 ")
    assert 'pip install "blocksparse[train]"' in said
    assert not list(tmp_path.iterdir())


def test_import_costs_less_than_numpy():
    code = """
import time
start = time.perf_counter(); import blocksparse; ours = time.perf_counter() - start
assert "numpy" not in sys.modules and "numba" not in sys.modules
start = time.perf_counter(); import numpy; theirs = time.perf_counter() - start
print(ours / theirs)
"""
    assert min(float(run(code)) for _ in range(3)) < 1


def test_help_needs_no_kernel():
    code = """
from blocksparse.cli import main
try:
    main(["bench", "--help"])
except SystemExit:
    pass
assert "numba" not in sys.modules
"""
    assert "GFLOP/s" in run(code)

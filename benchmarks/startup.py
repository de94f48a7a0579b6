"""Measure how long a fresh process takes to its first answer.

Two kinds of process: one that finds everything compiled before on this machine, and one that is the
first ever, with an empty cache of kernels. Each imports blocksparse, loads a sparse file
and runs one image; nothing else is imported. Medians over several processes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.compare import share
from benchmarks.processes import child
from benchmarks.stage import loading_pytorch, say, stage
from blocksparse.cli import console as ui
from blocksparse.perf import describe_machine, usable_cores

PROGRAM = """
import json, sys, time
import numpy as np
start = time.perf_counter()
import blocksparse
blocksparse.load  # what is imported lazily comes with the first use
imported = time.perf_counter()
network = blocksparse.load(sys.argv[1], threads=int(sys.argv[2]))
images = np.zeros((1, *network.input_shape), np.float32)
loaded = time.perf_counter()
network(images)
done = time.perf_counter()
assert "torch" not in sys.modules and "compiled" in str(network.engine)
print(json.dumps({
    "import blocksparse": imported - start,
    "load the file": loaded - imported,
    "first image": done - loaded,
    "load and first image": done - imported,
}))
"""
WHOLE = "whole process, Python's own start included"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    add, cores = parser.add_argument, usable_cores()
    add("--model", default="resnet50", metavar="NAME", help="network (resnet50)")
    add("--sparsity", type=share, default=0.75, metavar="S", help="of its file (0.75)")
    add("--image", type=ui.positive, metavar="PIXELS", help="height and width (the network's own)")
    add("--threads", type=ui.positive, default=cores, metavar="N", help=f"to use ({cores})")
    add("--runs", type=ui.positive, default=5, metavar="N", help="processes with caches (5)")
    add("--first-runs", type=ui.positive, default=2, metavar="N", help="without caches (2)")
    return parser.parse_args(arguments)


def process(
    file: Path, threads: int, environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Return the seconds of each part of one process."""
    start = time.perf_counter()
    parts = child(PROGRAM, file, str(threads), environment=environment)
    return parts | {WHOLE: time.perf_counter() - start}


def first_ever(file: Path, threads: int) -> dict[str, float]:
    """Return the seconds of each part of a process that finds no cache."""
    with tempfile.TemporaryDirectory() as folder:
        return process(file, threads, {"BLOCKSPARSE_CACHE": folder})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    chosen = parse(arguments)
    try:
        with loading_pytorch():
            from benchmarks import exports
        with tempfile.TemporaryDirectory() as folder:
            with stage(f"{chosen.model}: exporting", steps=False):
                file = exports.sparse_file(
                    chosen.model, chosen.image, chosen.sparsity, Path(folder)
                )[0]
            with stage(f"{chosen.runs} processes with caches", steps=False):
                process(file, chosen.threads)  # fills them
                warm = [process(file, chosen.threads) for _ in range(chosen.runs)]
            with stage(f"{chosen.first_runs} processes without", steps=False):
                cold = [first_ever(file, chosen.threads) for _ in range(chosen.first_runs)]
    except (ui.CommandError, ValueError, RuntimeError, OSError) as error:
        say(f"error: {error}")
        return 1
    figures = ("with caches, s", "first time ever, s")
    grid = ui.table("part", *figures, right=figures)
    for part in warm[0]:
        grid.add_row(part, *(f"{median(run[part] for run in runs):.2f}" for runs in (warm, cold)))
    out = ui.console()
    out.print(grid)
    out.print(f"{chosen.model}, {100 * chosen.sparsity:g} % sparse, {chosen.threads} threads")
    out.print(f"on {describe_machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure the peak memory of a fresh process that loads a network and runs one image.

blocksparse runs the sparse file, ONNX Runtime the dense network, each in a process that imports
nothing else. Counted is peak resident memory, Python, libraries and mapped files included. Each
process runs several times; the median is reported.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.compare import share
from benchmarks.processes import PEAK, child
from benchmarks.stage import loading_pytorch, say, stage
from blocksparse.cli import console as ui
from blocksparse.perf import describe_machine, usable_cores

OURS = f"""{PEAK}
import json, sys
import numpy as np
import blocksparse
network = blocksparse.load(sys.argv[1], threads=int(sys.argv[2]))
network(np.zeros((1, *network.input_shape), np.float32))
assert "torch" not in sys.modules
print(json.dumps({{"peak": peak_bytes()}}))
"""
# With its default options but for the threads.
ONNXRUNTIME = f"""{PEAK}
import json, sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
inputs = session.get_inputs()[0]
session.run(None, {{inputs.name: np.zeros((1, *inputs.shape[1:]), np.float32)}})
assert "torch" not in sys.modules
print(json.dumps({{"peak": peak_bytes()}}))
"""
PEER = "onnxruntime, dense"
BARE = f"""{PEAK}
import json
import numpy
print(json.dumps({{"peak": peak_bytes()}}))
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    add, cores = parser.add_argument, usable_cores()
    add("--model", default="resnet50", metavar="NAME", help="network (resnet50)")
    add("--sparsity", type=share, default=0.75, metavar="S", help="of our file (0.75)")
    add("--image", type=ui.positive, metavar="PIXELS", help="height and width (the network's own)")
    add("--threads", type=ui.positive, default=cores, metavar="N", help=f"of both ({cores})")
    add("--runs", type=ui.positive, default=5, metavar="N", help="processes of each kind (5)")
    return parser.parse_args(arguments)


def measure(file: Path, onnx: Path | None, threads: int, runs: int) -> dict[str, list[int]]:
    """Return the peak resident bytes of each process, by what it ran.

    Parameters
    ----------
    file, onnx : Path
        The sparse network, and the dense one; None leaves ONNX Runtime out.
    threads, runs : int
        What each network may use, and processes of each kind.
    """
    programs = {"blocksparse, sparse": (OURS, file)}
    if onnx is not None:
        programs[PEER] = (ONNXRUNTIME, onnx)
    programs["Python with NumPy alone"] = (BARE, file)
    child(OURS, file, str(threads))  # whatever is compiled once on a machine
    peaks: dict[str, list[int]] = {name: [] for name in programs}
    for _ in range(runs):
        for name, (program, path) in programs.items():
            peaks[name].append(int(child(program, path, str(threads))["peak"]))
    return peaks


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    chosen = parse(arguments)
    try:
        with loading_pytorch():
            from benchmarks import engines, exports
        with tempfile.TemporaryDirectory() as folder:
            with stage(f"{chosen.model}: exporting", steps=False):
                file, dense = exports.sparse_file(
                    chosen.model, chosen.image, chosen.sparsity, Path(folder)
                )
                onnx, left_out = None, ""
                try:
                    engines.load("onnxruntime")
                    onnx = dense.onnx()
                except engines.UnavailableError as error:
                    left_out = f"onnxruntime is left out: {error}"
            with stage(f"running {chosen.runs} processes of each kind", steps=False):
                peaks = measure(file, onnx, chosen.threads, chosen.runs)
    except (ui.CommandError, ValueError, RuntimeError, OSError) as error:
        say(f"error: {error}")
        return 1
    grid = ui.table("process", "peak MB, median", "least", "most", right=("peak MB, median",))
    middle = {name: median(values) for name, values in peaks.items()}
    for name, values in peaks.items():
        grid.add_row(name, *(f"{b / 1e6:.1f}" for b in (middle[name], min(values), max(values))))
    out = ui.console()
    out.print(grid)
    ratio = ""
    if PEER in middle:
        ratio = f": {middle['blocksparse, sparse'] / middle[PEER]:.2f} of ONNX Runtime's"
    out.print(f"{chosen.model}, {100 * chosen.sparsity:g} % sparse{ratio}")
    if left_out:
        out.print(left_out)
    out.print(f"on {describe_machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

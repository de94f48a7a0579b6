"""`blocksparse verify`: is a model file sound, and do the engines agree on it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from blocksparse.cli import console as ui

if TYPE_CHECKING:
    from blocksparse.format import Model
    from blocksparse.runtime.network import Network

Floats = npt.NDArray[np.float32]
IMAGES = 3  # odd and above one, so that batch handling shows

EPILOG = """\
examples:
  blocksparse verify model.bsr.safetensors
  blocksparse verify model.bsr.safetensors --json       to be read by a program

What is checked: every rule of the file format; that no weight is so small that it slows a CPU
down; then, on random images, that the NumPy reference engine gives finite numbers, that the
compiled engine gives the same up to rounding, also for one image at a time, and the same bits
when called twice and with another number of threads.

Two engines add in different orders, so they differ by rounding. What is allowed follows from the
length of the sums: 4 x 2^-23 x sqrt(terms of the dot products along the longest path) x the
largest output. The terms of a convolution that may run through Winograd's transforms count more
often, since those err more: ninefold for 3x3, up to 4.4-fold for others of 3, 5 or 7 taps.

exit status: 0 sound, 1 not sound (a warning alone is sound), 2 wrong command line"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
        What was checked.
    state : {"passed", "warning", "failed", "skipped"}
        How it went.
    detail : str
        The figures behind it, or why it was skipped.
    """

    name: str
    state: Literal["passed", "warning", "failed", "skipped"]
    detail: str


def add_parser(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "verify",
        help="is it sound: the format's rules, and both engines on random images",
        description="Check a model file, run it with both engines, and compare.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ui.add_file_argument(parser)
    parser.add_argument("--threads", type=ui.positive, metavar="N", help="threads to check with")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random images (0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=command)


def command(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit status."""
    path = ui.existing_file(arguments.file)
    with ui.progress("checking") as bar:
        checks = []
        for check in checks_of(path, arguments.threads, arguments.seed):
            checks.append(check)
            bar.update(bar.tasks[0].id, description=f"checked: {check.name}")
    sound = all(check.state != "failed" for check in checks)
    if arguments.json:
        tree = {"file": path.name, "sound": sound, "checks": [asdict(check) for check in checks]}
        ui.console().out(ui.json_text(tree), end="")
    else:
        grid = ui.table("check", "", "detail")
        for check in checks:
            grid.add_row(check.name, check.state, ui.one_line(check.detail))
        out = ui.console()
        out.print(grid)
        out.print(f"{ui.one_line(path.name)} is {'sound' if sound else 'NOT sound'}")
    return 0 if sound else 1


def checks_of(path: Path, threads: int | None, seed: int) -> Iterator[Check]:
    """Check a file, one thing after the other; what cannot be read ends the list.

    Parameters
    ----------
    path : Path
        The model file.
    threads : int or None
        Threads of the compiled engine; the runtime's default by None.
    seed : int
        Seed of the random images.
    """
    from blocksparse.format import FormatError
    from blocksparse.format.reader import read

    try:
        model = read(path)
    except FormatError as error:
        yield Check("file format", "failed", str(error))
        return
    arrays = len(model.weights) + len(model.vectors)
    yield Check(
        "file format",
        "passed",
        f"{len(model.graph.nodes)} nodes, {arrays} weights and vectors, "
        f"{ui.bytes_text(path.stat().st_size)}: every rule of docs/format.md",
    )
    yield _no_subnormals(model)
    yield from _runs(model, threads, seed)


def _no_subnormals(model: Model) -> Check:
    name = "no subnormal weights"
    least = np.finfo(np.float32).tiny
    found = 0
    for weight in model.weights.values():
        values = np.abs(weight.data if hasattr(weight, "data") else weight.values)
        found += int(np.count_nonzero((values > 0) & (values < least)))
    if found:
        return Check(
            name,
            "warning",
            f"{found} weights are below {least:.3g} and slow many CPUs down; export.py sets "
            "such weights to zero",
        )
    return Check(name, "passed", f"every weight is zero or at least {least:.3g}")


def _runs(model: Model, threads: int | None, seed: int) -> Iterator[Check]:
    from blocksparse.runtime import load, reference
    from blocksparse.runtime.tolerance import tolerance

    random = np.random.default_rng(seed)
    images = random.standard_normal((IMAGES, *model.input_shape), dtype=np.float32)
    expected = reference.run(model, images)
    shape = (IMAGES, *model.output_shape)
    if expected.shape != shape or not np.isfinite(expected).all():
        detail = f"outputs of shape {expected.shape}, expected {shape}, and all finite"
        yield Check("reference engine", "failed", detail)
        return
    largest = float(np.abs(expected).max())
    detail = f"{IMAGES} random images (seed {seed}), outputs finite, largest {largest:.3g}"
    yield Check("reference engine", "passed", detail)

    allowed = tolerance(model, largest)
    network = load(model, threads=threads)
    engine = str(network.engine)
    if engine.startswith("reference"):  # load has fallen back
        yield Check("compiled engine", "skipped", f"only the {engine}")
        return
    yield from _compiled_checks(network, images, expected, allowed)
    network.close()


def _compiled_checks(
    network: Network, images: Floats, expected: Floats, allowed: float
) -> Iterator[Check]:
    def compare(name: str, run: Callable[[], Floats], other: Floats) -> Check:
        difference = float(np.abs(run() - other).max())
        state: Literal["passed", "failed"] = "passed" if difference <= allowed else "failed"
        return Check(name, state, f"largest difference {difference:.3g}, allowed {allowed:.3g}")

    together = network(images)
    yield compare("compiled engine agrees", lambda: together, expected)
    yield compare(
        "one image at a time",
        lambda: np.concatenate([network(image[np.newaxis]) for image in images]),
        expected,
    )
    threads = network.threads
    network.threads = 1 if threads > 1 else 2
    same = np.array_equal(network(images), together)
    verdict = "the same bits" if same else "other results"
    name = f"{network.threads} instead of {threads} threads"
    yield Check(name, "passed" if same else "failed", f"{verdict} as with {threads}")
    network.threads = threads
    same = np.array_equal(network(images), together)
    detail = "two calls give the same bits" if same else "two calls give different bits"
    yield Check("repeatable", "passed" if same else "failed", detail)

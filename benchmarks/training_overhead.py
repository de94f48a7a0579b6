"""Measure what pruning adds to a training step.

A real fit on random images, with the sparsity callback at work. Timed are whole steps, and within
them the callback: every step imposes the masks, some build them anew. What pruning adds to a step
is the first, plus the second spread over the interval between two updates. Steps of a fit without
the callback are timed as well; between fits, though, a machine drifts by more than pruning takes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.compare import share
from benchmarks.stage import loading_pytorch, say, stage
from blocksparse.cli import console as ui
from blocksparse.perf import Timing, describe_machine

OFTEN = 3  # steps between updates in the measured fit: it is short, and updates are to be timed


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_overhead", description=__doc__
    )
    add = parser.add_argument
    add("--model", default="resnet50", metavar="NAME", help="network (resnet50)")
    add("--sparsity", type=share, default=0.75, metavar="S", help="the ramp's end (0.75)")
    add("--image", type=ui.positive, default=224, metavar="PIXELS", help="height and width (224)")
    add("--batch", type=ui.positive, default=8, metavar="N", help="images of a step (8)")
    add("--steps", type=ui.positive, default=13, metavar="N", help="of each fit (13)")
    add(
        "--interval",
        type=ui.positive,
        default=50,
        metavar="N",
        help="steps over which an update is spread (50, as in configs/sparsity/base.yaml)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    chosen = parse(arguments)
    try:
        with loading_pytorch():
            import torch

            from benchmarks.fits import fit
        if chosen.steps < 2 * OFTEN or not chosen.sparsity:
            raise ui.UsageError(
                f"nothing to measure: --steps has to be at least {2 * OFTEN}, for updates and "
                "steps between them, and --sparsity above 0"
            )
        network = (chosen.model, chosen.image, chosen.batch, chosen.steps)
        with tempfile.TemporaryDirectory() as folder:
            with stage(f"{chosen.steps} steps with pruning", steps=False):
                pruned = fit(*network, chosen.sparsity, OFTEN, folder)
            with stage(f"{chosen.steps} steps without", steps=False):
                plain = fit(*network, 0.0, OFTEN, folder)
    except (ui.CommandError, ValueError, RuntimeError) as error:
        say(f"error: {error}")
        return 2 if isinstance(error, ui.UsageError) else 1
    rows = {
        "step with masks imposed": pruned.whole,
        "step without": plain.whole,
        "masks imposed": pruned.masked,
        "masks built anew and imposed": pruned.updated,
    }
    timings = {name: Timing.of(seconds) for name, seconds in rows.items()}
    figures = ("ms, median", "quartiles", "timed")
    grid = ui.table("part", *figures, right=figures)
    for name, timing in timings.items():
        quartiles = f"{timing.q1_ms:.1f} to {timing.q3_ms:.1f}"
        grid.add_row(name, f"{timing.median_ms:.1f}", quartiles, str(timing.rounds))
    imposed = timings["masks imposed"].median_ms
    update = timings["masks built anew and imposed"].median_ms - imposed
    added = imposed + update / chosen.interval
    step = timings["step without"].median_ms
    out = ui.console()
    out.print(grid)
    out.print(
        f"pruning adds {100 * added / step:.2f} % to a step: {imposed:.1f} ms for the masks, and "
        f"{update:.1f} ms for an update, spread over {chosen.interval} steps"
    )
    out.print(
        f"{chosen.model}, {chosen.batch} images of {chosen.image}x{chosen.image}, "
        f"{torch.get_num_threads()} threads"
    )
    out.print(f"on {describe_machine(torch=torch.__version__)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

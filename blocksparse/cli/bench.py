"""`blocksparse bench`: how fast a model runs on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blocksparse.cli import console as ui

if TYPE_CHECKING:
    from blocksparse.perf import Machine, Timing, TotalCost
    from blocksparse.runtime.network import Network

MIN_SECONDS = 0.25
"""Of timed calls: twenty rounds of a network of 0.05 ms differ by two times from run to run."""

EPILOG = """\
examples:
  blocksparse bench model.bsr.safetensors                       one image at a time
  blocksparse bench model.bsr.safetensors --batch 1,4,16 --threads 1
  blocksparse bench model.bsr.safetensors --rounds 100 --save figures.json

Each batch size gets its turn in every round, so that a change of the machine's speed hits all of
them alike. ms is the median time of one call on the whole batch, with quartiles. Useful GFLOP/s
count the stored weights only; dense-equivalent GFLOP/s count the layers as if nothing had been
pruned, which is the speed a dense engine would need to keep up."""


@dataclass(frozen=True)
class Speed:
    """What one batch size reached.

    Attributes
    ----------
    batch : int
        Images per call.
    timing : Timing
        Milliseconds per call.
    images_per_second : float
        At the median.
    gflops_useful, gflops_dense_equivalent : float
        10^9 floating-point operations per second at the median, of the stored weights and of the
        dense network.
    """

    batch: int
    timing: Timing
    images_per_second: float
    gflops_useful: float
    gflops_dense_equivalent: float

    @classmethod
    def of(cls, batch: int, timing: Timing, work: TotalCost) -> Speed:
        """Combine a timing with the work of one image."""
        images_per_second = batch / (timing.median_ms / 1e3)
        return cls(
            batch=batch,
            timing=timing,
            images_per_second=images_per_second,
            gflops_useful=images_per_second * work.flops_kept / 1e9,
            gflops_dense_equivalent=images_per_second * work.flops_dense / 1e9,
        )


def add_parser(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "bench",
        help="how fast it runs here: ms, images/s, GFLOP/s",
        description="Time a model on random input.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ui.add_file_argument(parser)
    parser.add_argument(
        "--batch",
        type=ui.positives,
        default=[1],
        metavar="N[,N...]",
        help="batch sizes, such as 1,4,16 (1)",
    )
    parser.add_argument(
        "--rounds",
        type=ui.positive,
        default=20,
        metavar="N",
        help="timed calls per batch size, at least (20); small networks get more",
    )
    parser.add_argument(
        "--save", type=Path, metavar="PATH", help="also write the figures there, as JSON"
    )
    ui.add_engine_arguments(parser)
    parser.set_defaults(run=command)


def command(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit status."""
    path = ui.existing_file(arguments.file)
    ui.check_target(arguments.save)
    from blocksparse.perf import describe_machine
    from blocksparse.runtime import load

    with ui.progress("preparing the kernels (the first time on a machine takes seconds)"):
        network = load(path, threads=arguments.threads, engine=arguments.engine)
    with ui.progress("measuring", steps=1) as bar:
        speeds = measure(
            network, arguments.batch, arguments.rounds, lambda share: ui.advance_to(bar, share)
        )
    machine = describe_machine()
    _show(path, network, speeds, machine)
    if arguments.save is not None:
        ui.write_whole(arguments.save, ui.json_text(_facts(path, network, speeds, machine)))
    network.close()
    return 0


def measure(
    network: Network,
    batches: list[int],
    rounds: int,
    on_round: Callable[[float], None] | None = None,
) -> list[Speed]:
    """Time a network at several batch sizes, interleaved.

    Parameters
    ----------
    network : Network
        Loaded; it is warmed up here.
    batches : list of int
        Images per call.
    rounds : int
        Timed calls per batch size, at least; as many more as `MIN_SECONDS` asks for.
    on_round : callable, optional
        Told the share of the work that is done, 0..1.

    Returns
    -------
    list of Speed
        One per batch size, repeated sizes once.
    """
    from blocksparse.perf import cost, interleave, total

    random = np.random.default_rng(0)
    work = total(cost(network.model))
    candidates: dict[str, Callable[[], object]] = {}
    for batch in dict.fromkeys(batches):
        network.warmup(batch)
        array = random.standard_normal((batch, *network.input_shape), dtype=np.float32)
        candidates[str(batch)] = lambda array=array: network(array)  # type: ignore[misc]
    timings = interleave(candidates, rounds=rounds, min_seconds=MIN_SECONDS, on_round=on_round)
    return [Speed.of(int(batch), timing, work) for batch, timing in timings.items()]


def _show(path: Path, network: Network, speeds: list[Speed], machine: Machine) -> None:
    out = ui.console()
    plural = "" if network.threads == 1 else "s"
    out.print(f"{ui.one_line(path.name)}: {network.threads} thread{plural}, {network.engine}")
    figures = (
        "batch",
        "ms per batch",
        "quartiles, ms",
        "images/s",
        "useful GFLOP/s",
        "dense-equivalent GFLOP/s",
    )
    grid = ui.table(*figures, right=figures)
    for speed in speeds:
        timing = speed.timing
        grid.add_row(
            str(speed.batch),
            f"{timing.median_ms:.3f}",
            f"{timing.q1_ms:.3f} to {timing.q3_ms:.3f}",
            f"{speed.images_per_second:.1f}",
            f"{speed.gflops_useful:.1f}",
            f"{speed.gflops_dense_equivalent:.1f}",
        )
    out.print(grid)
    out.print(f"median of {speeds[0].timing.rounds} rounds on {machine}")


def _facts(path: Path, network: Network, speeds: list[Speed], machine: Machine) -> dict[str, Any]:
    return {
        "file": path.name,
        "engine": str(network.engine),
        "threads": network.threads,
        "machine": asdict(machine) | {"versions": dict(machine.versions)},
        "speeds": [asdict(speed) for speed in speeds],
    }

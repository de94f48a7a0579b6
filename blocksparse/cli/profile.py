"""`blocksparse profile`: where the time goes, layer by layer, and how near the machine's bound."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocksparse.cli import console as ui
from blocksparse.cli.machine import measured

if TYPE_CHECKING:
    from blocksparse.perf.ceilings import Ceilings
    from blocksparse.perf.profile import Layer, Profile

COLUMNS = (
    "layer", "weight", "output", "density", "kernel", "tile", "ms", "share", "useful GFLOP/s",
    "dense-equivalent GFLOP/s", "of bound", "bound by", "imbalance",
)  # fmt: skip
FIGURES = (
    "density", "ms", "share", "useful GFLOP/s", "dense-equivalent GFLOP/s", "of bound", "imbalance",
)  # fmt: skip
WIDE = 170  # columns of a terminal that has room for everything
ONLY_WIDE = ("weight", "kernel", "tile", "dense-equivalent GFLOP/s")

EPILOG = """\
examples:
  blocksparse profile model.bsr.safetensors                 one image at a time, in running order
  blocksparse profile model.bsr.safetensors --sort time     the layers that take longest first
  blocksparse profile model.bsr.safetensors --batch 8 --threads 1 --json

ms of a layer is the mean over the middle half of the calls, so that layers add up. Useful GFLOP/s
count the stored weights only, dense-equivalent GFLOP/s count the layer as if nothing had been
pruned. tile is outputs by inputs of one block of the kernel.

"of bound" compares a layer with the least time it could take on this machine, the larger of
  computing: useful operations over the multiply-adds per second of `blocksparse machine`, and
  reading: stored weights, inputs (rows that a window reads) and output, each once, over the
  bandwidth of where they come from:
  weights from the nearest cache that holds those of the whole network, inputs and output from the
  nearest that holds the layer's. "bound by" says which it is.
100 % cannot be reached by a kernel that also has to move data within the nearest cache; well above
half is good. More is possible for a convolution marked (Winograd), which multiplies less often than
its weights ask for, and where data came from nearer than assumed.

imbalance is the work of the busiest thread over that of the average one: 10 % means that threads
waited for about that share of the layer. The last lines compare the sum of layers with calls of
the whole network, timed in turns; their difference, dispatch, is what Python and waking threads
take (and can be below zero, for noting the times takes time, too).

A terminal of less than 170 columns shows fewer columns; a pipe (| less -S) and --json show all."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "profile",
        help="where the time goes: ms, GFLOP/s and share of the machine's bound, layer by layer",
        description="Time each layer of a model on random input and compare it with its bound.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ui.add_file_argument(parser)
    parser.add_argument(
        "--batch", type=ui.positive, default=1, metavar="N", help="images per call (1)"
    )
    ui.add_threads_argument(parser)
    parser.add_argument(
        "--rounds", type=ui.positive, default=20, metavar="N", help="timed whole calls (20)"
    )
    parser.add_argument(
        "--sort",
        choices=("order", "time"),
        default="order",
        help="layers in running order (default), or the slowest first",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=command)


def command(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit status."""
    path = ui.existing_file(arguments.file)
    from blocksparse.perf.profile import profile
    from blocksparse.runtime import load

    with ui.progress("preparing the kernels (the first time on a machine takes seconds)"):
        network = load(path, threads=arguments.threads)
    ceilings = measured()
    with ui.progress("measuring", steps=1) as bar:
        found = profile(
            network,
            ceilings,
            arguments.batch,
            arguments.rounds,
            lambda share: ui.advance_to(bar, share),
        )
    network.close()
    layers = list(found.layers)
    if arguments.sort == "time":
        layers.sort(key=lambda layer: -layer.ms)
    if arguments.json:
        ui.console().out(ui.json_text(_facts(path, found, layers, ceilings)), end="")
    else:
        _show(path, found, layers, ceilings)
    return 0


def _facts(path: Path, found: Profile, layers: list[Layer], ceilings: Ceilings) -> dict[str, Any]:
    return {
        "file": path.name,
        "batch": found.batch,
        "threads": found.threads,
        "layers": [asdict(layer) | {"parts": dict(layer.parts)} for layer in layers],
        "layers_ms": found.layers_ms,
        "network": asdict(found.network),
        "rest_ms": found.rest_ms,
        "bound_ms": found.bound_ms,
        "ceilings": asdict(ceilings),
    }


def _show(path: Path, found: Profile, layers: list[Layer], ceilings: Ceilings) -> None:
    out = ui.console()
    plural = "" if found.threads == 1 else "s"
    images = "1 image" if found.batch == 1 else f"{found.batch} images"
    out.print(f"{ui.one_line(path.name)}: {images} a call, {found.threads} thread{plural}")
    names = COLUMNS if out.width >= WIDE else tuple(n for n in COLUMNS if n not in ONLY_WIDE)
    grid = ui.table(*names, right=FIGURES)

    def add(cells: dict[str, str]) -> None:
        grid.add_row(*(cells.get(name, "") for name in names))

    for layer in layers:
        add(_cells(layer))
        if len(layer.parts) > 1:
            for name, ms in layer.parts:
                add({"layer": f"  {name}", "ms": f"{ms:.3f}"})
    grid.add_section()
    for text, ms in (("sum of layers", found.layers_ms), ("network", found.network.median_ms)):
        of_bound = ui.percent(found.bound_ms / ms)
        share = ui.percent(ms / found.layers_ms)
        add({"layer": text, "ms": f"{ms:.3f}", "share": share, "of bound": of_bound})
    rest = ui.percent(found.rest_ms / found.layers_ms)
    add({"layer": "dispatch", "ms": f"{found.rest_ms:.3f}", "share": rest})
    out.print(grid)
    timing = found.network
    out.print(
        f"whole network: median of {timing.rounds} rounds, quartiles {timing.q1_ms:.3f} to "
        f"{timing.q3_ms:.3f} ms; least possible {found.bound_ms:.3f} ms on {ceilings.processor}: "
        f"{ceilings.peak('f32', found.threads):.0f} GFLOP/s, "
        + ", ".join(
            f"{row.name} {ceilings.bandwidth(row.name, found.threads):.0f} GB/s"
            for row in ceilings.reading
        ),
        soft_wrap=True,
    )
    for note in ceilings.notes:
        out.print(f"note: {note}", soft_wrap=True)


def _cells(layer: Layer) -> dict[str, str]:
    """Texts of one row, by column."""
    from blocksparse.perf.profile import WINOGRAD

    cells = {
        "layer": ui.one_line(layer.name),
        "output": "x".join(map(str, layer.output_shape)),
        "kernel": layer.kernel,
        "tile": layer.tile,
        "ms": f"{layer.ms:.3f}",
        "share": ui.percent(layer.share),
        "of bound": ui.percent(layer.bound_share),
        "bound by": layer.bound_by,
    }
    if layer.op in ("load", "store"):
        cells["layer"] += f" ({layer.op})"
    if WINOGRAD in dict(layer.parts):
        cells["kernel"] += " (Winograd)"
    if layer.imbalance is not None:
        cells["imbalance"] = ui.percent(layer.imbalance)
    if layer.weight_shape is not None and layer.density is not None:
        cells["weight"] = "x".join(map(str, layer.weight_shape))
        cells["density"] = ui.percent(layer.density)
        cells["useful GFLOP/s"] = f"{layer.gflops_useful:.1f}"
        cells["dense-equivalent GFLOP/s"] = f"{layer.gflops_dense_equivalent:.1f}"
    return cells

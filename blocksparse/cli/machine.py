"""`blocksparse machine`: what this machine can do at most."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from blocksparse.cli import console as ui

if TYPE_CHECKING:
    from blocksparse.perf import Ceilings

EPILOG = """\
examples:
  blocksparse machine           the ceilings, measured the first time (some seconds) and then kept
  blocksparse machine --again   measure once more, such as when nothing else runs any more
  blocksparse machine --json    all figures, to be read by a program

Multiply-adds: vector instructions that never leave the registers, two operations for each product,
for float32 and for the bf16 and int8 dot products this processor has. Reading: a working set that
fits no nearer cache, read again and again. Each figure is the best of several short runs, on one
thread and on all cores this process may use.

What else runs only makes a run slower, so --again keeps the better figure, old or new. The last
line says in which file they lie; to start over, delete it.

FLOP per byte is float32 multiply-adds over reading, on all cores: a layer that does less work than
that for each byte it reads from there is held back by reading, whatever its kernel.
`blocksparse profile FILE` compares each layer of a network with these ceilings."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "machine",
        help="what this machine can do at most: multiply-adds/s, bytes/s of each cache",
        description="Measure the ceilings of this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--again", action="store_true", help="measure once more, and keep the better"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=command)


def command(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit status."""
    found = measured(arguments.again)
    if arguments.json:
        ui.console().out(ui.json_text(asdict(found)), end="")
    else:
        _show(found)
    return 0


def measured(again: bool = False) -> Ceilings:
    """Return the ceilings of this machine, with a progress bar where they have to be measured."""
    from blocksparse.perf import machine_ceilings

    with ui.progress("measuring this machine (once, some seconds)", steps=1) as bar:
        return machine_ceilings(again, lambda share: ui.advance_to(bar, share))


def _show(found: Ceilings) -> None:
    from blocksparse.perf.measure import ceilings_file

    out = ui.console()
    caches = ", ".join(f"{cache.name} {_size(cache.bytes)}" for cache in found.caches)
    plural = "" if found.cores == 1 else "s"
    out.print(f"{found.processor}, {found.cores} core{plural}; caches: {caches}")
    every = f"{found.cores} threads"
    figures = ("1 thread", every, "FLOP per byte")
    teams = ("1 thread",) if found.cores == 1 else ("1 thread", every)
    grid = ui.table("ceiling", *teams, "unit", "FLOP per byte", "working set", right=figures)
    peak = found.peak("f32", found.cores)
    for row in (*found.compute, *found.reading):
        reads = row in found.reading
        values = ["" if rate is None else _three(rate) for rate in (row.one, row.all)][: len(teams)]
        grid.add_row(
            f"read {row.name}" if reads else f"multiply-add {row.name}",
            *values,
            row.unit,
            f"{peak / row.all:.1f}" if reads and row.all is not None else "",
            f"{_size(row.bytes_one)} a thread" if reads else "registers",
        )
    out.print(grid)
    slowest = min(
        median / best
        for row in (*found.compute, *found.reading)
        for median, best in ((row.median_one, row.one), (row.median_all, row.all))
        if median is not None and best is not None
    )
    out.print(
        f"best of several runs; the median run reached {ui.percent(slowest)} of the best or more"
    )
    for note in found.notes:
        out.print(f"note: {note}", soft_wrap=True)
    if (path := ceilings_file()).exists():  # a folder that cannot be written keeps none
        out.print(f"kept in {ui.one_line(str(path))}", soft_wrap=True)


def _size(count: int) -> str:
    """Bytes of a cache with a binary prefix, as caches are sold."""
    kib = count / 1024
    return f"{kib:.3g} KiB" if kib < 1024 else f"{kib / 1024:.4g} MiB"


def _three(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"

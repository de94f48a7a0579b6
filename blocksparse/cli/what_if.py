"""`blocksparse what-if`: what sparsity would bring here, before any training."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocksparse.cli import console as ui

if TYPE_CHECKING:
    from blocksparse.format import Model
    from blocksparse.perf import Machine
    from blocksparse.perf.what_if_figures import LayerFigures, NetworkFigures, WhatIf

LEVELS = [0.5, 0.75, 0.9]
MIN_SECONDS = 0.25  # of each of the two measurements: small networks get more rounds
SHOWN_LAYERS = 15
SHOWN_NAMES = 8
HELD_BACK = 0.005  # share of the prunable weights: less than this is not worth a line

EPILOG = """\
examples:
  blocksparse what-if model.bsr.safetensors                     50, 75 and 90 %, in 8x8 blocks
  blocksparse what-if resnet50 --sparsity 0.6,0.8 --batch 4     of torchvision, with random weights
  blocksparse what-if resnet50 --pattern nm2:4 --threads 1
  blocksparse what-if resnet50 --dense 'layer1.*,*.downsample.*'

The network is given random masks at each level, and runs in turn with its dense version. Time
depends on how many blocks are stored and hardly on which: a trained network of that sparsity takes
about as long. Accuracy is not measured; only training tells it.

A layer is called faster or slower than dense where the quartiles of its times lie apart from those
of dense. break-even is the sparsity from which on it is faster, interpolated between measured
times: `always` even with nothing dropped, `never` not even at the highest level.

patterns: {patterns}"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "what-if",
        help="what sparsity would bring here, before any training: ms and bytes by level",
        description="Measure a network dense and with random masks on this machine.",
        epilog=EPILOG.format(
            patterns="block8x8, block8x8_per_position, nm2:4 (or nm24), vector_nm2:4,\n"
            "unstructured; with any sizes. The same names choose `sparsity=` in training."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model file, dense or sparse, or a network by name, such as resnet50 "
        '(this needs PyTorch: pip install "blocksparse[train]")',
    )
    parser.add_argument(
        "--sparsity",
        type=_shares,
        metavar="S[,S...]",
        help="shares of the weights to drop in each layer (0.5,0.75,0.9)",
    )
    parser.add_argument(
        "--pattern", default="block8x8", metavar="NAME", help="what goes together (block8x8)"
    )
    parser.add_argument(
        "--dense",
        type=lambda text: text.split(","),
        default=[],
        metavar="GLOB[,GLOB...]",
        help="layers to leave dense, such as 'layer1.*'",
    )
    parser.add_argument(
        "--prune-first-conv", action="store_true", help="do not leave the first convolution dense"
    )
    parser.add_argument(
        "--prune-classifier", action="store_true", help="do not leave the classifier dense"
    )
    parser.add_argument(
        "--batch", type=ui.positive, default=1, metavar="N", help="images per call (1)"
    )
    parser.add_argument(
        "--size",
        type=ui.positive,
        metavar="PIXELS",
        help="height and width of an image, for a network by name (what it was made for)",
    )
    parser.add_argument(
        "--threads", type=ui.positive, metavar="N", help="threads of a call (one per usable core)"
    )
    parser.add_argument(
        "--rounds", type=ui.positive, default=20, metavar="N", help="timed calls of each (20)"
    )
    parser.add_argument("--all", action="store_true", help="show every layer, not the slowest only")
    parser.add_argument(
        "--save", type=Path, metavar="PATH", help="also write the figures there, as JSON"
    )
    parser.set_defaults(run=command)


def command(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit status."""
    ui.check_target(arguments.save)
    from blocksparse.perf import describe_machine
    from blocksparse.perf.masked_models import Choice
    from blocksparse.perf.random_masks import parse_pattern
    from blocksparse.perf.what_if import what_if

    try:
        pattern = parse_pattern(arguments.pattern)
    except ValueError as error:
        raise ui.UsageError(str(error)) from None
    fixed = pattern.fixed_sparsity
    if fixed is not None and arguments.sparsity not in (None, [fixed]):
        raise ui.UsageError(f"{pattern} has one sparsity, {fixed:g}; leave --sparsity out")
    choice = Choice(
        first_conv_dense=not arguments.prune_first_conv,
        classifier_dense=not arguments.prune_classifier,
        dense=arguments.dense,
    )
    # The file stays until the end: the model's arrays are mapped from it.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        model = _model(arguments.model, arguments.size, Path(folder))
        with ui.progress("making networks", steps=1) as bar:

            def show(what: str, share: float) -> None:
                bar.update(bar.tasks[0].id, description=what)
                ui.advance_to(bar, share)

            found = what_if(
                model,
                arguments.sparsity or LEVELS,
                pattern,
                choice=choice,
                batch=arguments.batch,
                threads=arguments.threads,
                rounds=arguments.rounds,
                min_seconds=MIN_SECONDS,
                on_progress=show,
            )
    machine = describe_machine()
    drawn = ", random weights" if model.provenance.get("weights") == "random" else ""
    _show(f"{Path(arguments.model).name}{drawn}", found, machine, arguments.all)
    if arguments.save is not None:
        ui.write_whole(arguments.save, ui.json_text(_facts(arguments.model, found, machine)))
    return 0


def _model(text: str, size: int | None, folder: Path) -> Model:
    """Read a model file, or build a network of that name with random weights and read that."""
    from blocksparse.format import read

    path = Path(text)
    if path.exists() or len(path.parts) > 1 or path.suffix == ".safetensors":
        if size is not None:
            raise ui.UsageError("--size is for a network by name; a file's input size is fixed")
        return read(ui.existing_file(text))
    target = folder / "untrained.bsr.safetensors"
    # A process of its own, so that PyTorch is neither imported nor computing where times are taken.
    call = [sys.executable, "-m", "blocksparse.pipeline.untrained"]
    call += [] if size is None else ["--size", str(size)]
    with ui.progress(f"building {ui.one_line(text)} with random weights (PyTorch)"):
        done = subprocess.run(
            [*call, "--", text, str(target)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise ui.CommandError(f"{text}, which is no model file, cannot be built by name: {reason}")
    return read(target)


def _show(name: str, found: WhatIf, machine: Machine, everything: bool) -> None:
    out = ui.console()
    threads = f"{found.threads} thread{'' if found.threads == 1 else 's'}"
    out.print(f"{ui.one_line(name)}: {found.pattern}, batch {found.batch}, {threads}")
    out.print(_network_table(found))
    slowest = sorted(found.layers, key=lambda layer: -layer.dense_ms)
    shown = slowest if everything else slowest[:SHOWN_LAYERS]
    out.print(_layer_table(found, [layer for layer in found.layers if layer in shown]))
    if len(shown) < len(found.layers):
        others = len(found.layers) - len(shown)
        out.print(f"The {len(shown)} slowest layers; --all shows {others} more.")
    reasons: dict[str, list[str]] = {}
    for layer in found.left_dense:
        kind = layer.reason.split(" (")[0]  # one line for depthwise convolutions of any width
        reasons.setdefault(kind, []).append(layer.name)
    for reason, names in reasons.items():
        out.print(f"left dense, {reason}: {_names(names)}")
    for line in advice(found):
        out.print(line)
    out.print(f"median of {found.dense.timing.rounds} rounds on {machine}")


def _network_table(found: WhatIf) -> Any:
    figures = (
        "ms per batch",
        "quartiles, ms",
        "against dense",
        "file",
        "prunable weights kept",
        "all parameters kept",
    )
    grid = ui.table("sparsity", *figures, title="whole network", right=figures)
    for row in (found.dense, *found.levels):
        timing = row.timing
        grid.add_row(
            "dense" if row is found.dense else _level(row),
            f"{timing.median_ms:.3f}",
            f"{timing.q1_ms:.3f} to {timing.q3_ms:.3f}",
            f"{row.speedup:.2f}x as fast",
            ui.bytes_text(row.file_bytes),
            ui.percent(row.prunable_kept),
            ui.percent(row.parameters_kept),
        )
    return grid


def _layer_table(found: WhatIf, layers: list[LayerFigures]) -> Any:
    levels = [f"{_level(row)}, ms" for row in found.levels]
    figures = ("share of dense time", "dense, ms", *levels, "break-even")
    grid = ui.table("layer", "shape", *figures, title="layers that are pruned", right=figures)
    for layer in layers:
        grid.add_row(
            ui.one_line(layer.name),
            "x".join(map(str, layer.shape)),
            ui.percent(layer.dense_share),
            f"{layer.dense_ms:.3f}",
            *(f"{layer.ms_at(row.sparsity):.3f}" for row in found.levels),
            _break_even(layer.break_even),
        )
    return grid


def advice(found: WhatIf) -> Iterator[str]:
    """Say which levels are worth training, and which layers to leave dense."""
    pay = [_level(row) for row in found.levels if row.pays(found.dense)]
    rest = [_level(row) for row in found.levels if not row.pays(found.dense)]
    if pay:
        yield f"Faster than dense beyond the spread of the rounds: {', '.join(pay)}."
    if rest:
        yield f"Not faster than dense beyond the spread of the rounds: {', '.join(rest)}."
    all_gain = True
    for row in found.levels:
        if row.prunable_kept > 1 - row.sparsity + HELD_BACK:
            yield (
                f"At {_level(row)}, {ui.percent(row.prunable_kept)} of the prunable weights are "
                "left: layers with few blocks, or ragged groups, keep more than asked."
            )
        slow = [layer.name for layer in found.slower_than_dense(row.sparsity)]
        unsure = [layer.name for layer in found.within_spread(row.sparsity)]
        all_gain = all_gain and not slow and not unsure
        if slow:
            yield (
                f"At {_level(row)}, {len(slow)} of {len(found.layers)} layers are slower than "
                f"dense: {_names(slow)}. Leave them dense, here with --dense, in training with "
                "sparsity.dense."
            )
        if unsure:
            yield (
                f"At {_level(row)}, {len(unsure)} of {len(found.layers)} layers differ from dense "
                f"by no more than the spread of the rounds: {_names(unsure)}."
            )
    if all_gain:
        yield (
            "Every layer that is pruned is faster than dense at every level, beyond the spread of "
            "the rounds."
        )
    yield "What a level costs in accuracy is not measured here; only training tells it."


def _level(row: NetworkFigures) -> str:
    return f"{100 * row.sparsity:g} %"


def _break_even(sparsity: float | None) -> str:
    if sparsity is None:
        return "never"
    rounded = round(100 * sparsity)  # closer than the times are known
    return f"{rounded} %" if rounded else "always"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(map(ui.one_line, names[:SHOWN_NAMES])) + more


def _shares(text: str) -> list[float]:
    """Parse shares in 0..1 with commas between them, for argparse."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share < 1 for share in shares):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of shares from 0 to below 1, such as 0.5,0.75"
        )
    return shares


def _facts(name: str, found: WhatIf, machine: Machine) -> dict[str, Any]:
    return {
        "model": Path(name).name,
        "machine": asdict(machine) | {"versions": dict(machine.versions)},
        **asdict(found),
    }

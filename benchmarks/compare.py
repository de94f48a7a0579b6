"""Measure blocksparse against the fastest dense engines: same network, same threads.

A torchvision network gets random weights and, per sparsity, blocks of zeros. The files run in
blocksparse; ONNX Runtime, OpenVINO and PyTorch (eager and compiled) run the dense network. Outputs
are compared with PyTorch's before anything is timed. Then all engines take turns, round by round,
in one process.

Each combination of model, pattern, batch and threads is one setting and one page, as Markdown and
JSON in benchmarks/results/; several settings get a summary.md as well. A page that is there stays
if the new one is not to be quoted or lacks engines: that one goes beside it, its name ending in
-busy or -partial. A setting takes about a minute, more for a large batch, and the first time.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.figures import PEERS, SPARSITIES, Result, Setting
from benchmarks.stage import loading_pytorch, say, stage
from benchmarks.tables import facts, page, save, summary
from blocksparse.cli import console as ui
from blocksparse.perf import usable_cores

EPILOG = """\
examples:
  python -m benchmarks.compare                                   ResNet-50, 0 to 90 %, batch 1
  python -m benchmarks.compare --model vgg16 --batch 1 8 --threads 1 2
  python -m benchmarks.compare --model resnet18 --image 64 --without torch-compile"""
RESULTS = Path(__file__).parent / "results"
PATTERNS = {"shared": True, "per-position": False}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, cores = parser.add_argument, usable_cores()
    numbers: dict[str, Any] = {"nargs": "+", "type": ui.positive, "metavar": "N"}
    add("--model", nargs="+", default=["resnet50"], metavar="NAME", help="networks (resnet50)")
    add(
        "--sparsity",
        nargs="+",
        type=share,
        default=SPARSITIES,
        metavar="S",
        help="of the prunable weights, each at least 0 and below 1 (0 0.5 0.75 0.9)",
    )
    add(
        "--pattern",
        nargs="+",
        choices=PATTERNS,
        default=["shared"],
        help="8x8 blocks: one choice for all kernel positions (default), or one for each",
    )
    add("--batch", default=[1], help="images per call (1)", **numbers)
    add("--threads", default=[cores], help=f"of each engine (all usable cores: {cores})", **numbers)
    add("--image", type=ui.positive, metavar="PIXELS", help="height and width (the network's own)")
    add("--rounds", type=ui.positive, default=10, metavar="N", help="timed calls at least (10)")
    add(
        "--seconds",
        type=float,
        default=4.0,
        metavar="S",
        help="go on until all timed calls together have taken this long (4)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of weights and images (0)")
    add(
        "--without",
        nargs="+",
        choices=PEERS,
        default=[],
        metavar="ENGINE",
        help=f"leave out some of: {', '.join(PEERS)}",
    )
    add(
        "--zeros",
        action="store_true",
        help="also give the sparsest network to the peers that read ONNX, its zeros kept",
    )
    add("--output", type=Path, default=RESULTS, metavar="FOLDER", help="where the pages go")
    chosen = parser.parse_args(arguments)
    for name in ("model", "sparsity", "pattern", "batch", "threads"):
        setattr(chosen, name, tuple(dict.fromkeys(getattr(chosen, name))))  # twice is once
    return chosen


def share(text: str) -> float:
    """Parse a sparsity, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a share of at least 0 and below 1, such as 0.75 for 75 %"
        )
    return value


def run(chosen: argparse.Namespace) -> Iterator[Result]:
    """Measure setting after setting; what settings share is exported once.

    Raises
    ------
    UsageError
        A network is unknown, or cannot take such images; said before the first is measured. Or
        PyTorch is not installed.
    MismatchError
        An engine computes something else than PyTorch.
    """
    with loading_pytorch():  # not needed for --help
        from benchmarks import exports, networks
        from benchmarks.measurement import measure_setting
        from blocksparse.sparsity import Block

    for model in chosen.model:
        if model not in (known := networks.model_names()):
            near = difflib.get_close_matches(model, known, n=4) or known
            raise ui.UsageError(f"there is no network {model}; there are {', '.join(near)}")
    for model, pattern in itertools.product(chosen.model, chosen.pattern):
        image = chosen.image or networks.default_image(model)
        with tempfile.TemporaryDirectory() as folder:
            with stage(f"{model}, {pattern}: exporting and verifying") as exporting:
                made = exports.make(
                    model,
                    image,
                    chosen.sparsity,
                    Block(8, 8, shared=PATTERNS[pattern]),
                    max(chosen.batch),
                    chosen.seed,
                    Path(folder),
                    chosen.zeros,
                    exporting.step,
                )
            with closing(made):
                for batch, threads in itertools.product(chosen.batch, chosen.threads):
                    yield measure_setting(
                        made,
                        Setting(model, image, chosen.sparsity, pattern, batch, threads),
                        rounds=chosen.rounds,
                        seconds=chosen.seconds,
                        seed=chosen.seed,
                        without=chosen.without,
                        exporting=exporting.seconds,
                    )
                    gc.collect()  # the engines of a setting go before the next one's are built


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and save; return the exit status."""
    chosen = parse(arguments)
    results, names = [], []
    try:
        chosen.output.mkdir(parents=True, exist_ok=True)
        for result in run(chosen):
            results.append(result)
            text = page(result)
            stem = save(chosen.output, result.setting.name, facts(result), text)
            names.append(stem.name)
            sys.stdout.write(text + "\n")
            parts = ", ".join(f"{name} {spent:.0f} s" for name, spent in result.seconds.items())
            say(f"wrote {stem}.md and .json after {sum(result.seconds.values()):.0f} s: {parts}")
    except (ui.CommandError, ValueError, RuntimeError, OSError) as error:
        say(f"error: {error}")
        return 2 if isinstance(error, ui.UsageError) else 1
    if len(results) > 1:
        text = summary(results, names)
        ui.write_whole(chosen.output / "summary.md", text)
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

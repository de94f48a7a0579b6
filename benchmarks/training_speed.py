"""Measure where the time of a training step goes, and which ways of computing it pay.

Steps of pruning with a teacher, on the CPU, in one process and without a trainer: variants take
turns, round by round, and each part of each step is timed. Image files, with the statistics of
photographs, are written for it; decoding those of one batch is timed as well.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.compare import RESULTS
from benchmarks.stage import loading_pytorch, say, stage
from benchmarks.tables import MARK, QUIET, busy, grid, save
from benchmarks.training_figures import BASELINE, OTHERS, PARTS, Result, Row
from blocksparse.cli import console as ui
from blocksparse.perf import Timing, describe_machine, interleave, usable_cores

SLOW = 5.0  # times the first variant from which one step says enough


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_speed", description=__doc__
    )
    add, cores = parser.add_argument, usable_cores()
    add("--model", default="resnet20", metavar="NAME", help="network (resnet20)")
    add("--image", type=ui.positive, metavar="PIXELS", help="height and width (the network's own)")
    add("--batch", type=ui.positive, default=128, metavar="N", help="images of a step (128)")
    add("--threads", type=ui.positive, default=cores, metavar="N", help=f"to use ({cores})")
    add("--rounds", type=ui.positive, default=7, metavar="N", help="timed turns at least (7)")
    add(
        "--without",
        nargs="+",
        choices=[variant.name for variant in OTHERS],
        default=[],
        metavar="VARIANT",
        help=f"leave out some of: {', '.join(variant.name for variant in OTHERS)}",
    )
    add("--output", type=Path, default=RESULTS, metavar="FOLDER", help="where the page goes")
    return parser.parse_args(arguments)


def measure(chosen: argparse.Namespace, root: Path) -> Result:
    """Measure everything, with image files in an empty folder.

    Raises
    ------
    ValueError
        If the network is unknown or cannot take such images.
    UsageError
        If PyTorch is not installed.
    """
    with loading_pytorch():
        import torch

        from benchmarks.networks import default_image
        from benchmarks.training_steps import Batches, Decoding, Step, make_data, picture_side
        from blocksparse.training import build_model

    image, batch, threads = (
        chosen.image or default_image(chosen.model),
        chosen.batch,
        chosen.threads,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.compiler.reset()  # nothing is left of another setting
    try:
        network = build_model(chosen.model, num_classes=1000, input_shape=(3, image, image))
        with stage("writing image files, and decoding them into memory", steps=False):
            data = make_data(root, image, batch, 0)
            batches = {cached: Batches.of(data[cached]) for cached in data}
        left_out = [f"{name} is left out, as asked" for name in chosen.without]
        chosen_variants = [v for v in (BASELINE, *OTHERS) if v.name not in chosen.without]
        steps: dict[str, Step] = {}
        limit = math.inf
        for variant in chosen_variants:
            with stage(f"{variant.name}: first steps", steps=False):
                try:
                    step = Step(variant, network, batches[not variant.from_files])
                    took = step.first()
                except Exception as error:  # compilers and kernels raise of all kinds
                    if variant == BASELINE:
                        raise
                    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    left_out.append(f"{variant.name} is left out, it failed: {first}")
                    continue
            if variant == BASELINE:
                limit = SLOW * took
            if took > limit:
                left_out.append(
                    f"{variant.name} took no turns: one step takes {took:.2f} s, "
                    f"{SLOW * took / limit:.1f} times the first step of {BASELINE.name}"
                )
                continue
            steps[variant.name] = step
        for line in left_out:
            say(f"  {line}")
        decoding = Decoding(root, batch)
        with stage("taking steps in turns") as running:
            timings = interleave(
                {**steps, "decoding": decoding}, rounds=chosen.rounds, on_round=running.step
            )
    finally:
        torch.set_num_threads(before)
    return Result(
        model=chosen.model,
        image=image,
        side=picture_side(image),
        batch=batch,
        threads=threads,
        date=datetime.date.today().isoformat(),
        machine=str(describe_machine(torch=torch.__version__)),
        command=f"python -m benchmarks.training_speed --model {chosen.model} --image {image} "
        f"--batch {batch} --threads {threads} --rounds {chosen.rounds}"
        + (f" --without {' '.join(chosen.without)}" if chosen.without else ""),
        rows=tuple(
            Row(
                name,
                timings[name],
                # Of each turn, the second step, which is the one that `interleave` times.
                Timing.of(step.cpu[1::2]),
                {part: Timing.of([times[part] for times in step.seen[1::2]]) for part in PARTS},
            )
            for name, step in steps.items()
        ),
        decoding=timings["decoding"],
        left_out=tuple(left_out),
    )


def page(result: Result) -> str:
    """Return the results as Markdown."""
    first, batch = result.rows[0], result.batch
    whole = sum(timing.median_ms for timing in first.parts.values())
    lines = [
        f"# Training steps of {result.model}, {result.image}x{result.image} images, batch {batch}, "
        f"{result.threads} thread{'' if result.threads == 1 else 's'}",
        "",
        f"{result.date}, {result.machine}.",
        "",
        "```bash",
        result.command,
        "```",
        "",
        "A step of pruning with a teacher of the same kind: float32, masks of 8x8 blocks that are "
        "final, batches made by the training process from images that are in memory. Medians and "
        f"quartiles; variants took turns for {first.timing.rounds} rounds.",
        "",
        f"## Where the time goes: {first.name}",
        "",
        *grid(
            ("part", "ms per step", "quartiles", "images/s", "share"),
            [
                (*_cells(name, timing, batch), f"{100 * timing.median_ms / whole:.1f} %")
                for name, timing in first.parts.items()
            ],
        ),
        "",
        f"Decoding the {batch} files of a batch (PNG, {result.side}x{result.side} pixels), which "
        f"images in memory spare: {result.decoding.median_ms:.1f} ms "
        f"({result.decoding.q1_ms:.1f} to {result.decoding.q3_ms:.1f}), on one thread.",
        "",
        "## Variants",
        "",
        f"How many times as fast as {first.name} a variant is, by the clock and by the time that "
        "the threads of the process computed, which hardly depends on what else runs:",
        "",
        *grid(
            ("variant", "ms per step", "quartiles", "images/s", "times", "CPU ms", "times"),
            [
                (
                    *_cells(row.name, row.timing, batch),
                    f"{result.ratio(row):.2f}",
                    f"{row.cpu.median_ms:.1f}",
                    f"{first.cpu.median_ms / row.cpu.median_ms:.2f}",
                )
                for row in result.rows
            ],
        ),
        "",
        "Medians of their parts, ms:",
        "",
        *grid(
            ("variant", *PARTS),
            [
                (row.name, *(f"{row.parts[part].median_ms:.1f}" for part in PARTS))
                for row in result.rows
            ],
        ),
    ]
    for line in result.left_out:
        lines += ["", f"{line[0].upper()}{line[1:]}."]
    lines += busy({row.name: row.timing for row in result.rows})
    share = first.cpu.median_ms / first.timing.median_ms
    # Steady load makes no wide quartiles. How much several threads should compute is not known.
    if result.threads == 1 and share * QUIET < 1:
        lines += [
            "",
            f"{MARK} The machine was busy: the process had {share:.2f} of a core. "
            "Ratios of CPU times are what can be trusted of this page.",
        ]
    return "\n".join(lines) + "\n"


def _cells(name: str, timing: Timing, batch: int) -> tuple[str, ...]:
    return (
        name,
        f"{timing.median_ms:.1f}",
        f"{timing.q1_ms:.1f} to {timing.q3_ms:.1f}",
        f"{1e3 * batch / timing.median_ms:.1f}" if timing.median_ms else "",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and save; return the exit status."""
    chosen = parse(arguments)
    try:
        chosen.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            result = measure(chosen, Path(folder))
    except (ui.CommandError, ValueError, RuntimeError, OSError) as error:
        say(f"error: {error}")
        return 1
    text = page(result)
    ratios = {row.name: result.ratio(row) for row in result.rows}
    facts = asdict(result) | {"times_as_fast": ratios}
    stem = save(chosen.output, result.name, facts, text)
    sys.stdout.write(text)
    say(f"wrote {stem}.md and .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())

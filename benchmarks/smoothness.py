"""Measure how evenly time grows with the batch and with the size of the images.

A sparse network runs batches of 1 to 9 images, and single images of a dozen sizes, odd ones
included, all in turns. Each point's time per pixel is compared with that of its neighbours. Then,
unless one thread is all that is used, all threads are compared with one, and every layer is asked
how well its work was shared.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.compare import RESULTS, share
from benchmarks.series import CLIFF, Call, Point, Share, points, resized, shares
from benchmarks.stage import loading_pytorch, say, stage
from benchmarks.tables import busy, grid, save
from blocksparse.cli import console as ui
from blocksparse.format import Model, read
from blocksparse.perf import Timing, describe_machine, interleave, usable_cores

BATCHES = tuple(range(1, 10))
SIZES = (160, 171, 183, 192, 205, 224, 231, 243, 256, 269, 288, 299)
BATCH = 8  # images against one alone
IDLE = 0.05  # share of their time that threads may wait in a layer
MATTERS = 0.01  # share of a call's time from which a layer is looked at
LISTED = 12  # layers of a table


@dataclass(frozen=True)
class Scaling:
    """A batch on one thread and on several.

    Attributes
    ----------
    batch : int
        Images of a call.
    one, several : Timing
        Milliseconds per call.
    shares : tuple of Share
        Of each layer.
    """

    batch: int
    one: Timing
    several: Timing
    shares: tuple[Share, ...]

    @property
    def times(self) -> float:
        """How many times as fast several threads are as one."""
        return self.one.median_ms / self.several.median_ms


@dataclass(frozen=True)
class Result:
    """Everything the page says.

    Attributes
    ----------
    model, sparsity, image, threads
        What was measured.
    date, machine, command : str
        When, where, and the command line that does it again.
    batches, sizes : tuple of Point
        In order; sizes at batch 1.
    scaling : tuple of Scaling
        A single image, and a batch; nothing where one thread was measured.
    """

    model: str
    sparsity: float
    image: int
    threads: int
    date: str
    machine: str
    command: str
    batches: tuple[Point, ...]
    sizes: tuple[Point, ...]
    scaling: tuple[Scaling, ...]

    @property
    def name(self) -> str:
        """File name of the results; the same on every machine."""
        percent = f"{100 * self.sparsity:g}".replace(".", "_")
        return f"smoothness-{self.model}-sparsity-{percent}-threads{self.threads}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoothness", description=__doc__)
    add, cores = parser.add_argument, usable_cores()
    add("--model", default="resnet18", metavar="NAME", help="network (resnet18)")
    add("--sparsity", type=share, default=0.75, metavar="S", help="of its file (0.75)")
    add("--threads", type=ui.positive, default=cores, metavar="N", help=f"to use ({cores})")
    add("--rounds", type=ui.positive, default=15, metavar="N", help="timed calls at least (15)")
    add(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="go on until the timed calls of a series together have taken this long (10)",
    )
    add("--output", type=Path, default=RESULTS, metavar="FOLDER", help="where the page goes")
    return parser.parse_args(arguments)


def scaling(model: Model, batches: Sequence[int], threads: int, rounds: int) -> tuple[Scaling, ...]:
    """Measure batches on one thread and on several, all in turns."""
    with ExitStack() as stack:
        calls = {}
        for batch in batches:
            for count in (threads, 1):
                calls[f"{batch} {count}"] = call = Call(model, batch, count)
                stack.callback(call.network.close)
        timings = interleave(calls, rounds=rounds)
        return tuple(
            Scaling(
                batch,
                timings[f"{batch} 1"],
                timings[f"{batch} {threads}"],
                shares(calls[f"{batch} 1"], calls[f"{batch} {threads}"], rounds),
            )
            for batch in batches
        )


def measure(model: Model, chosen: argparse.Namespace) -> Result:
    """Measure everything; the machine is named, and the command that does it again."""
    threads, rounds, seconds = chosen.threads, chosen.rounds, chosen.seconds
    image = model.input_shape[1]
    with ExitStack() as stack:

        def opened(models: Sequence[Model], batches: Sequence[int]) -> list[Call]:
            calls = [Call(m, n, threads) for m, n in zip(models, batches, strict=True)]
            for call in calls:
                stack.callback(call.network.close)
            return calls

        with stage("preparing kernels", steps=False):
            by_batch = opened([model] * len(BATCHES), BATCHES)
            by_size = opened([resized(model, size) for size in SIZES], [1] * len(SIZES))
        with stage(f"batches of {BATCHES[0]} to {BATCHES[-1]}") as running:
            batches = points(BATCHES, by_batch, rounds, seconds, running.step)
        with stage(f"images of {SIZES[0]} to {SIZES[-1]} pixels") as running:
            sizes = points(SIZES, by_size, rounds, seconds, running.step)
        scaled: tuple[Scaling, ...] = ()
        if threads > 1:
            with stage(f"one thread and {threads}", steps=False):
                scaled = scaling(model, (1, BATCH), threads, rounds)
    return Result(
        model=chosen.model,
        sparsity=chosen.sparsity,
        image=image,
        threads=threads,
        date=datetime.date.today().isoformat(),
        machine=str(describe_machine()),
        command=f"python -m benchmarks.smoothness --model {chosen.model} "
        f"--sparsity {chosen.sparsity:g} --threads {threads} --rounds {rounds} "
        f"--seconds {seconds:g}",
        batches=batches,
        sizes=sizes,
        scaling=scaled,
    )


def page(result: Result) -> str:
    """Return the results as Markdown."""
    threads = f"{result.threads} thread{'' if result.threads == 1 else 's'}"
    title = f"{result.model}, {100 * result.sparsity:g} % sparse, {threads}"
    first = result.batches[0]
    batch = next(point for point in result.batches if point.at == BATCH)
    lines = [
        f"# Smoothness of {title}",
        "",
        f"{result.date}, {result.machine}.",
        "",
        "```bash",
        result.command,
        "```",
        "",
        f"8x8 blocks shared, random weights, float32; medians and quartiles of at least "
        f"{first.timing.rounds} rounds in which all points of a series take turns. The ratio is to "
        "the median of a point's neighbours, two on either side. From a ratio of "
        f"{CLIFF:g} on, the page names the layers that take longer per pixel than the neighbours', "
        "as shares of the point's time.",
        "",
        f"## Batches of {result.image}x{result.image} images",
        "",
        *grid(
            ("images", "ms per image", "quartiles", "ratio to neighbours", "layers"),
            [
                (
                    str(point.at),
                    f"{point.timing.median_ms / point.at:.2f}",
                    f"{point.timing.q1_ms / point.at:.2f} to {point.timing.q3_ms / point.at:.2f}",
                    f"{point.ratio:.2f}",
                    ", ".join(point.layers),
                )
                for point in result.batches
            ],
        ),
        "",
        f"An image in a batch of {BATCH} takes {batch.each / first.each:.2f} of the time of one "
        "alone.",
        "",
        "## Sizes of a single image",
        "",
        "Strides round sizes up, so multiply-adds per pixel differ: the ratio of work is theirs.",
        "",
        *grid(
            (
                "pixels",
                "ms",
                "quartiles",
                "ns per pixel",
                "ratio to neighbours",
                "of work",
                "layers",
            ),
            [
                (
                    f"{point.at}x{point.at}",
                    f"{point.timing.median_ms:.2f}",
                    f"{point.timing.q1_ms:.2f} to {point.timing.q3_ms:.2f}",
                    f"{point.each:.1f}",
                    f"{point.ratio:.2f}",
                    f"{point.work:.2f}",
                    ", ".join(point.layers),
                )
                for point in result.sizes
            ],
        ),
    ]
    for row in result.scaling:
        lines += ["", *_shared(row, result.threads)]
    lines += busy(_timings(result))
    return "\n".join(lines) + "\n"


def _timings(result: Result) -> dict[str, Timing]:
    """Return all timings of a page, by what it calls them."""
    image = result.image
    named = {f"{_images(point.at)} of {image}x{image}": point.timing for point in result.batches}
    # The same size stands in both series; both timings count.
    named |= {f"1 image of {p.at}x{p.at} among sizes": p.timing for p in result.sizes}
    for row in result.scaling:
        named[f"{_images(row.batch)} on one thread"] = row.one
        named[f"{_images(row.batch)} on {result.threads} threads"] = row.several
    return named


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _shared(row: Scaling, threads: int) -> list[str]:
    """Return the part of the page about one batch on several threads."""
    whole = sum(each.several_ms for each in row.shares)
    waiting = sum(each.several_ms * each.idle for each in row.shares)
    listed = [each for each in row.shares if each.several_ms >= MATTERS * whole]
    uneven = [each for each in listed if each.idle > IDLE]
    lost = {each.name: each.several_ms - each.one_ms / threads for each in listed}
    listed.sort(key=lambda each: -lost[each.name])
    return [
        f"## {threads} threads against one, {_images(row.batch)}",
        "",
        f"{row.one.median_ms:.2f} ms on one thread, {row.several.median_ms:.2f} ms on {threads}: "
        f"{row.times:.2f} times as fast. Waiting for the slowest thread of a step takes "
        f"{100 * waiting / whole:.1f} % of the time. {len(uneven)} of {len(listed)} layers that "
        f"take at least {100 * MATTERS:g} % of the time leave threads idle for more than "
        f"{100 * IDLE:g} % of theirs. Those that lose most, against 1/{threads} of the time on one "
        "thread:",
        "",
        *grid(
            ("layer", "computed", "ms on 1", f"ms on {threads}", "times", "lost ms", "idle"),
            [
                (
                    each.name,
                    each.way,
                    f"{each.one_ms:.3f}",
                    f"{each.several_ms:.3f}",
                    f"{each.one_ms / each.several_ms:.2f}",
                    f"{lost[each.name]:.3f}",
                    f"{100 * each.idle:.1f} %",
                )
                for each in listed[:LISTED]
            ],
            left=2,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and save; return the exit status."""
    chosen = parse(arguments)
    try:
        with loading_pytorch():
            from benchmarks import exports
        chosen.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            with stage(f"{chosen.model}: exporting", steps=False):
                file = exports.sparse_file(chosen.model, None, chosen.sparsity, Path(folder))[0]
            model = read(file)
            result = measure(model, chosen)
    except (ui.CommandError, ValueError, RuntimeError, OSError) as error:
        say(f"error: {error}")
        return 1
    text = page(result)
    stem = save(chosen.output, result.name, asdict(result), text)
    sys.stdout.write(text)
    say(f"wrote {stem}.md and .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())

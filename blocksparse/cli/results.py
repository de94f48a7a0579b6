"""`blocksparse results`: finished runs in one table, and plots of what pruning cost and gained."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blocksparse.cli import console as ui
from blocksparse.cli.result_groups import Found, Group, Run, find_runs, group_runs

COLUMNS = (
    "",
    "name",
    "pattern",
    "sparsity",
    "FLOPs gone",
    "top-1 dense",
    "top-1 of the file",
    "loss, points",
    "file, bytes",
    "ms per image",
    "against dense",
)
LEFT = COLUMNS[1:3]  # the others hold figures
PLOTS = {"latency": "accuracy_latency.svg", "bytes": "accuracy_bytes.svg"}

EPILOG = """\
examples:
  blocksparse results runs                        every finished run below runs/
  blocksparse results runs/a/0 runs/b --json      all figures, to be read by a program
  blocksparse results runs --out comparison       results.md and two plots (these need matplotlib)

A row is one command: runs that differ only in their seed share it, with the mean of their
accuracies, the lowest and highest, and the sample standard deviation (sd) of the loss. Accuracy is
that of the exported file, a loss is against the dense network on the same images. Times are medians
at batch 1, and `against dense` is how many times as fast the file runs as the dense network in the
same runtime. Times of a busy machine are marked: take them again with
`python train.py resume=FOLDER`, which trains nothing again."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "results",
        help="compare finished runs: one table, and plots against ms and bytes",
        description="Compare finished runs of train.py by their closing reports (report.json).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        type=Path,
        nargs="+",
        help="folder of a run, or one above several, such as runs",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"write results.md, {' and '.join(PLOTS.values())} there",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(run=command)


def command(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit status."""
    found = find_runs(arguments.folders)
    groups, replaced = group_runs(found.runs)
    left_out, on_times = list(_left_out(found, replaced)), list(_on_times(groups))
    if not groups:
        where = ", ".join(map(str, arguments.folders))
        why = " ".join(left_out) or "`python train.py` writes one into the folder of each run."
        raise ui.UsageError(f"no finished run (report.json) at or below {where}. {why}")
    if arguments.out is not None:
        _write(arguments.out, groups, on_times)  # without folders of this machine
    if arguments.json:
        ui.console().out(ui.json_text(_facts(groups, found, replaced)), end="")
    else:
        _show(groups, [*left_out, *on_times])
    return 0


def _show(groups: Sequence[Group], notes: Sequence[str]) -> None:
    out = ui.console()
    grid = ui.table(*COLUMNS, right=tuple(name for name in COLUMNS if name not in LEFT))
    for number, group in enumerate(groups, 1):
        grid.add_row(str(number), *_cells(group))
    out.print(grid)
    for line in _commands(groups):
        out.print(line, soft_wrap=True)
    for note in notes:
        out.print(note, soft_wrap=True)


def _cells(group: Group) -> Iterator[str]:
    """Yield one row of the table, without its number."""
    yield ui.one_line(group.first.name)
    yield ui.one_line(group.first.pattern)
    yield ui.percent(group.mean(lambda run: run.sparsity))
    yield ui.percent(group.mean(lambda run: run.flops_gone))
    yield f"{100 * group.mean(lambda run: run.dense):.2f} %"
    top1 = f"{100 * group.mean(lambda run: run.top1):.2f} %"
    if len(group.runs) > 1:
        low, high = group.span(lambda run: run.top1)
        top1 += f" ({100 * low:.2f} to {100 * high:.2f}, {len(group.runs)} seeds)"
    yield top1
    deviation = group.deviation(lambda run: run.loss)
    spread = "" if deviation is None else f" (sd {deviation:.2f})"
    yield f"{group.mean(lambda run: run.loss):.2f}{spread}"
    yield f"{round(group.mean(lambda run: run.file_bytes)):,}"
    yield f"{_ms(group.time(lambda run: run.ms))}{' (busy)' if group.busy else ''}"
    yield f"{group.time(lambda run: run.dense_ms / run.ms):.2f}x as fast"


def _ms(milliseconds: float) -> str:
    """Return three digits, without an exponent."""
    digits = 3 if milliseconds < 1 else 2 if milliseconds < 10 else 1
    return f"{milliseconds:.{digits}f}"


def _commands(groups: Sequence[Group]) -> Iterator[str]:
    """Yield a line for each row: what makes its runs."""
    for number, group in enumerate(groups, 1):
        folder = group.first.folder.resolve().name
        yield f"{number}: " + ui.one_line(
            group.command or f"no command recorded, the run in {folder}"
        )


def _left_out(found: Found, replaced: Sequence[tuple[Run, Run]]) -> Iterator[str]:
    """Say which runs are in no row, and why."""
    for folder in found.unfinished:
        yield (
            f"{folder}: still running, or broken off, so not in the table. Go on with one that was "
            f"broken off: python train.py resume={shlex.quote(str(folder))}"
        )
    for folder, task in found.other:
        yield f"{folder}: task={task}, which ends without a closing report."
    for out, kept in replaced:
        yield f"{out.folder}: same command and seed as {kept.folder}, which counts instead."


def _on_times(groups: Sequence[Group]) -> Iterator[str]:
    """Say what a reader of the times has to know besides them."""
    if any(group.busy for group in groups):
        yield (
            "(busy): other programs kept the machine busy. Do not trust these times, nor how many "
            "times as fast they make the file."
        )
    taken = {(run.threads, run.machine): None for group in groups for run in group.runs}
    where = [
        f"{threads} thread{'' if threads == 1 else 's'} on {ui.one_line(machine)}"
        for threads, machine in taken
    ]
    if len(where) == 1:
        yield f"Times at batch 1, {where[0]}."
    elif where:
        yield (
            "Times of different machines, versions or numbers of threads do not compare; here they "
            f"are of: {' | '.join(where)}."
        )


def _write(folder: Path, groups: Sequence[Group], notes: Sequence[str]) -> None:
    """Write the page and its plots; nothing where one of them cannot be made."""
    if folder.is_file():
        raise ui.UsageError(f"--out {folder} is a file; name a folder")
    try:
        from blocksparse.cli.result_plots import against_bytes, against_latency
    except ImportError as error:
        raise ui.CommandError(
            f"--out draws plots with matplotlib, which cannot be imported ({error}): "
            'pip install "blocksparse[train]", or pip install matplotlib. The table alone, '
            "without --out, needs neither"
        ) from error
    texts = {
        PLOTS["latency"]: against_latency(groups),
        PLOTS["bytes"]: against_bytes(groups),
        "results.md": _page(groups, notes),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        ui.write_whole(folder / name, text)


def _page(groups: Sequence[Group], notes: Sequence[str]) -> str:
    """Return the table in Markdown, with the command of each row below it."""
    rules = [":--" if name in LEFT else "--:" for name in COLUMNS]
    lines = ["# Results", "", _markdown_row(COLUMNS), f"|{'|'.join(rules)}|"]
    lines += [
        _markdown_row([str(number), *_cells(group)]) for number, group in enumerate(groups, 1)
    ]
    lines += ["", "```bash"]
    for number, group in enumerate(groups, 1):
        folder = group.first.folder.resolve().name
        made = ui.one_line(group.command) or f"# no command recorded, the run in {folder}"
        lines.append(f"{made}  # {number}")
    lines += ["```", ""]
    lines += [f"- {note}" for note in notes]
    for what, name in PLOTS.items():
        lines += ["", f"![Top-1 accuracy against {what}]({name})"]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _facts(
    groups: Sequence[Group], found: Found, replaced: Sequence[tuple[Run, Run]]
) -> dict[str, Any]:
    """Return every figure of the table and of its runs, ready for JSON."""
    rows = []
    for group in groups:
        low, high = group.span(lambda run: run.top1)
        rows.append(
            {
                "name": group.first.name,
                "command": group.command,
                "pattern": group.first.pattern,
                "sparsity": group.mean(lambda run: run.sparsity),
                "flops_gone": group.mean(lambda run: run.flops_gone),
                "top1_dense": group.mean(lambda run: run.dense),
                "top1": {
                    "mean": group.mean(lambda run: run.top1),
                    "lowest": low,
                    "highest": high,
                },
                "loss_points": {
                    "mean": group.mean(lambda run: run.loss),
                    "standard_deviation": group.deviation(lambda run: run.loss),
                },
                "file_bytes": group.mean(lambda run: run.file_bytes),
                "ms": group.time(lambda run: run.ms),
                "times_as_fast_as_dense": group.time(lambda run: run.dense_ms / run.ms),
                "busy": group.busy,
                "runs": [asdict(run) | {"folder": str(run.folder)} for run in group.runs],
            }
        )
    return {
        "rows": rows,
        "unfinished": [str(folder) for folder in found.unfinished],
        "other_tasks": {str(folder): task for folder, task in found.other},
        "replaced": {str(out.folder): str(kept.folder) for out, kept in replaced},
    }

"""Pages of results: one per setting, and a summary of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.figures import OURS, Result, Row
from blocksparse.cli import console as ui
from blocksparse.perf import Timing

QUIET = 1.2  # third over first quartile that a quiet machine stays below


def page(result: Result) -> str:
    """Return the results of one setting as Markdown."""
    setting, peer = result.setting, result.fastest_peer
    against = f"the fastest peer ({peer.kind})" if peer else "no peer"
    rounds = result.rows[0].timing.rounds
    lines = [
        f"# {setting}",
        "",
        f"{result.date}, {result.machine}.",
        "",
        "```bash",
        result.command,
        "```",
        "",
        "Random weights, float32. Every engine has the same weights and the same number of "
        f"threads; median and quartiles of {rounds} rounds in which all take turns. Sparsity is "
        "of the prunable weights: the first convolution, the classifier and grouped convolutions "
        "stay dense. The last column of the first table says how many times as fast as "
        f"{against} a row is.",
        "",
        *grid(
            ("engine", "ms per batch", "quartiles", "images/s", "times as fast as " + against),
            [_timing_cells(result, row) for row in result.rows],
        ),
        "",
        *grid(
            ("file", "bytes", "parameters kept", "of all", "GFLOPs per image", "of all"),
            [
                (
                    _percent(work.sparsity),
                    f"{work.bytes:,}",
                    f"{work.parameters_kept:,}",
                    f"{100 * work.parameters_kept / work.parameters:.1f} %",
                    f"{work.flops_kept / 1e9:.2f}",
                    f"{100 * work.flops_kept / work.flops:.1f} %",
                )
                for work in result.work
            ],
        ),
        "",
        *grid(
            ("engine", "largest difference from PyTorch's logits", "allowed"),
            [(row.name, f"{row.max_error:.1e}", f"{row.allowed:.1e}") for row in result.rows],
        ),
    ]
    for line in result.left_out:
        lines += ["", f"{line[0].upper()}{line[1:]}."]
    lines += noise(result)
    return "\n".join(lines) + "\n"


def save(folder: Path, name: str, facts: Any, text: str) -> Path:
    """Write a page as Markdown and its figures as JSON; return their path without its ending."""
    stem = folder / name
    ui.write_whole(folder / f"{name}.json", ui.json_text(facts))
    ui.write_whole(folder / f"{name}.md", text)
    return stem


def noise(result: Result) -> list[str]:
    """Return a warning where the machine was too busy for the figures to mean much."""
    return busy({row.name: row.timing for row in result.rows})


def busy(timings: Mapping[str, Timing]) -> list[str]:
    """Return the same for any timings, by name."""
    noisy = [name for name, timing in timings.items() if timing.q3_ms > QUIET * timing.q1_ms]
    if not noisy:
        return []
    return [
        "",
        f"**Not to be quoted.** The machine was busy: the quartiles of {'; '.join(noisy)} lie more "
        f"than {QUIET - 1:.0%} apart. Measure again when nothing else runs.",
    ]


def summary(results: Sequence[Result]) -> str:
    """Return a page over several settings: ratios first, then milliseconds."""
    shares = list(dict.fromkeys(work.sparsity for result in results for work in result.work))
    shares.sort()
    kinds = list(dict.fromkeys(r.kind for x in results for r in x.rows if r.kind != OURS))
    head = ("network", "pattern", "batch", "threads")
    ratios, times = [], []
    for result in results:
        setting = result.setting
        label = (setting.model, setting.pattern, str(setting.batch), str(setting.threads))
        own = {row.sparsity: row for row in result.rows if row.kind == OURS}
        dense = {row.kind: row for row in result.rows if row.kind != OURS and not row.sparsity}
        peer = result.fastest_peer
        mark = " (busy)" if noise(result) else ""
        ratios.append(
            (
                *label,
                (peer.kind if peer else "none") + mark,
                *(_times(result.ratio(own[share])) if share in own else "" for share in shares),
            )
        )
        times.append(
            (
                *label,
                *(_ms(dense.get(kind)) for kind in kinds),
                *(_ms(own.get(share)) for share in shares),
            )
        )
    columns = tuple(f"{_percent(share)}" for share in shares)
    machines = list(dict.fromkeys(f"{result.date}, {result.machine}." for result in results))
    lines = [
        "# blocksparse against the fastest dense engine",
        "",
        *machines,
        "",
        "How many times as fast as the fastest peer on the dense network blocksparse is, by the "
        "medians, at each sparsity of the prunable weights. Above 1 it is faster, below 1 slower.",
        "",
        *grid((*head, "fastest peer", *columns), ratios, left=5),
        "",
        "Milliseconds per batch, medians: the dense network in each peer, then blocksparse at "
        "each sparsity.",
        "",
        *grid((*head, *kinds, *(f"ours, {column}" for column in columns)), times, left=2),
        "",
        "Quartiles, differences of outputs, bytes and the command that measures again:",
        "",
        *(f"- [{result.setting}]({result.setting.name}.md)" for result in results),
    ]
    if any(noise(result) for result in results):
        lines += ["", "**(busy)**: not to be quoted; the quartiles were wide. See the page."]
    return "\n".join(lines) + "\n"


def facts(result: Result) -> dict[str, Any]:
    """Return the results of one setting as plain values for JSON."""
    peer = result.fastest_peer
    tree = asdict(result)
    for row, cells in zip(result.rows, tree["rows"], strict=True):
        cells["times_as_fast_as_fastest_peer"] = result.ratio(row)
    return tree | {"fastest_peer": peer.name if peer else None, "quiet": not noise(result)}


def _timing_cells(result: Result, row: Row) -> tuple[str, ...]:
    timing = row.timing
    return (
        row.name,
        f"{timing.median_ms:.2f}",
        f"{timing.q1_ms:.2f} to {timing.q3_ms:.2f}",
        f"{1e3 * result.setting.batch / timing.median_ms:.1f}",
        _times(result.ratio(row)),
    )


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _ms(row: Row | None) -> str:
    return "" if row is None else f"{row.timing.median_ms:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return a Markdown table; columns behind the first `left` hold figures and are set right."""
    marks = [":--" if column < left else "--:" for column in range(len(head))]
    return [
        f"| {' | '.join(head)} |",
        f"|{'|'.join(marks)}|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]

"""Pages of results: one per setting, and a summary of several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import OURS, Result, Row
from benchmarks.stage import say
from blocksparse.cli import console as ui
from blocksparse.perf import Timing

MARK = "**Not to be quoted.**"
QUIET = 1.2  # third over first quartile that a quiet machine stays below
FEWEST = 5  # rounds of which quartiles say something


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
    if result.handovers:
        q1, median, q3 = np.quantile(result.handovers, (0.25, 0.5, 0.75))
        lines += [
            "",
            f"A line of memory went from one core to the other in {median:.0f} ns (quartiles of "
            f"the rounds {q1:.0f} to {q3:.0f}). Where that changes, the cores were moved; the "
            "farther apart they are, the more two threads of one network lose to each other.",
        ]
    lines += noise(result)
    return "\n".join(lines) + "\n"


def save(folder: Path, name: str, facts: Any, text: str) -> Path:
    """Write a page as Markdown and its figures as JSON; return their path without its ending.

    A page that is there is not replaced by one that says less: one that is not to be quoted, or
    that lacks engines. Such a page is written beside it, under another name, and that is said.
    """
    worse = _worse(folder / name, facts, text)
    stem = folder / "-".join([name, *worse])
    if worse:
        say(
            f"{folder / name}.md is kept, as the new page {' and '.join(worse.values())}; the new "
            f"one is {stem}.md, and with --output FOLDER it goes elsewhere under its usual name"
        )
    ui.write_whole(folder / f"{stem.name}.json", ui.json_text(facts))
    ui.write_whole(folder / f"{stem.name}.md", text)
    return stem


def _worse(stem: Path, facts: Any, text: str) -> dict[str, str]:
    """Return what a page lacks that the one in its place has: a word for its name, and why."""
    try:
        before = stem.with_name(f"{stem.name}.md").read_text(encoding="utf-8")
        names = _engines(json.loads(stem.with_name(f"{stem.name}.json").read_text("utf-8")))
    except (OSError, ValueError):  # none is there, or no script can read it
        return {}
    result = {}
    if missing := [name for name in names if name not in _engines(facts)]:
        result["partial"] = f"lacks {'; '.join(missing)}"
    if MARK in text and MARK not in before:
        result["busy"] = "is not to be quoted"
    return result


def _engines(facts: Any) -> list[str]:
    """Name what a page compares; a page without rows compares nothing."""
    return [row["name"] for row in facts.get("rows", ())]


def noise(result: Result) -> list[str]:
    """Return a warning where the machine was too busy for the figures to mean much."""
    return busy({row.name: row.timing for row in result.rows})


def busy(timings: Mapping[str, Timing]) -> list[str]:
    """Return the same for any timings, by name."""
    rounds = min(timing.rounds for timing in timings.values())
    if rounds < FEWEST:
        return [
            "",
            f"{MARK} {rounds} rounds do not tell how quiet the machine was: it takes {FEWEST} at "
            "least.",
        ]
    noisy = [name for name, timing in timings.items() if timing.q3_ms > QUIET * timing.q1_ms]
    if not noisy:
        return []
    return [
        "",
        f"{MARK} The machine was busy: the quartiles of {'; '.join(noisy)} lie more "
        f"than {QUIET - 1:.0%} apart. Measure again when nothing else runs.",
    ]


def summary(results: Sequence[Result], names: Sequence[str] | None = None) -> str:
    """Return a page over several settings: ratios first, then milliseconds.

    Parameters
    ----------
    results : sequence of Result
        One per setting.
    names : sequence of str, optional
        What the page of each is called; by default the name of its setting.
    """
    names = names or [result.setting.name for result in results]
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
        *(f"- [{result.setting}]({name}.md)" for result, name in zip(results, names, strict=True)),
    ]
    if any(noise(result) for result in results):
        lines += ["", "**(busy)**: not to be quoted; the page says why."]
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

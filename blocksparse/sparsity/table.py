"""The plan as a table, for the screen, as Markdown, and as files."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from blocksparse.sparsity.plan import LayerPlan, Plan
from blocksparse.whole_file import write_whole

_HEADER = ("layer", "shape", "pattern", "target", "why")


def plan_table(plan: Plan) -> Table:
    """Return the plan as a rich table."""
    table = Table(title="Sparsity plan", caption=plan_summary(plan), caption_justify="left")
    for name in _HEADER:
        table.add_column(name, overflow="fold")
    for layer in plan.layers:
        table.add_row(*_cells(plan, layer), style=None if layer.pruned else "dim")
    return table


def plan_summary(plan: Plan) -> str:
    """Return one line: sparsity of the prunable weights and of all parameters, side by side."""
    return (
        f"{len(plan.pruned)} of {len(plan.layers)} layers pruned: sparsity {plan.sparsity:.4f} of "
        f"{plan.prunable:,} prunable weights, {plan.sparsity_of_all:.4f} of all "
        f"{plan.parameters:,} parameters"
    )


def plan_markdown(plan: Plan) -> str:
    """Return the plan as a Markdown table with its summary above."""
    lines = ["# Sparsity plan", "", plan_summary(plan), ""]
    lines.append("| " + " | ".join(_HEADER) + " |")
    lines.append("|" + "---|" * len(_HEADER))
    lines += ["| " + " | ".join(_cells(plan, layer)) + " |" for layer in plan.layers]
    return "\n".join(lines) + "\n"


def save_plan(plan: Plan, folder: Path) -> tuple[Path, Path]:
    """Write ``sparsity_plan.json`` and ``sparsity_plan.md`` into ``folder``; return their paths."""
    as_json, as_text = folder / "sparsity_plan.json", folder / "sparsity_plan.md"
    write_whole(as_json, json.dumps(plan.to_json(), indent=2) + "\n")
    write_whole(as_text, plan_markdown(plan))
    return as_json, as_text


def _cells(plan: Plan, layer: LayerPlan) -> tuple[str, ...]:
    target = "by rank" if layer.target is None else f"{layer.target:.4f}"
    return (
        layer.name or "(the network itself)",
        "x".join(map(str, layer.shape)),
        str(plan.pattern) if layer.pruned else "dense",
        target if layer.pruned else "",
        layer.reason,
    )

"""What a permutation of channels brought, layer by layer: a table for the screen, and files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from blocksparse.whole_file import write_whole

_HEADER = ("layer", "kept before", "kept after", "gain")


@dataclass(frozen=True)
class KeptScore:
    """The share of its score that a layer keeps at its final target, 0..1.

    Parameters
    ----------
    name : str
        Of the layer.
    before, after : float
        In the order the network came with, and in the new one.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class PermutationReport:
    """What was reordered, and what it brought.

    Parameters
    ----------
    layers : tuple of KeptScore
        Every pruned layer, in order of definition.
    pattern : str
        What they are pruned with.
    target : float
        The sparsity of the plan, 0..1.
    channels : int
        Strands of channels that could be reordered.
    moved : int
        Those that came to another place.
    fixed : mapping of str to int
        Why other channels keep their place, and how many.
    seconds : float
        How long it took.
    """

    layers: tuple[KeptScore, ...]
    pattern: str
    target: float
    channels: int
    moved: int
    fixed: Mapping[str, int]
    seconds: float

    @property
    def before(self) -> float:
        """The mean share kept before."""
        return sum(layer.before for layer in self.layers) / max(len(self.layers), 1)

    @property
    def after(self) -> float:
        """The mean share kept after; never below `before`."""
        return sum(layer.after for layer in self.layers) / max(len(self.layers), 1)

    def summary(self) -> str:
        """Return a few lines: what was kept on average, what moved, and what could not."""
        lines = [
            f"{self.pattern}, target {self.target:g}: the layers keep {self.after:.4f} of their "
            f"score on average, {self.before:.4f} before. {self.moved:,} of {self.channels:,} "
            f"channels moved, in {self.seconds:.1f} s"
        ]
        lines += [f"{count:,} channels stay: {why}" for why, count in self.fixed.items()]
        return "\n".join(lines)

    def table(self) -> Table:
        """Return the report as a rich table."""
        table = Table(title="Channel permutation", caption=self.summary(), caption_justify="left")
        for number, name in enumerate(_HEADER):
            table.add_column(name, overflow="fold", justify="right" if number else "left")
        for layer in self.layers:
            table.add_row(*_cells(layer))
        return table

    def to_markdown(self) -> str:
        """Return the report as a Markdown table with its summary above."""
        lines = ["# Channel permutation", "", *self.summary().split("\n"), ""]
        lines.append("| " + " | ".join(_HEADER) + " |")
        lines.append("|---" + "|--:" * (len(_HEADER) - 1) + "|")
        lines += ["| " + " | ".join(_cells(layer)) + " |" for layer in self.layers]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {"before": self.before, "after": self.after, **asdict(self)}

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write ``permutation.json`` and ``permutation.md`` into ``folder``; return their paths."""
        as_json, as_text = folder / "permutation.json", folder / "permutation.md"
        write_whole(as_json, json.dumps(self.to_json(), indent=2) + "\n")
        write_whole(as_text, self.to_markdown())
        return as_json, as_text


def _cells(layer: KeptScore) -> tuple[str, ...]:
    gain = layer.after - layer.before
    return layer.name, f"{layer.before:.4f}", f"{layer.after:.4f}", f"{gain:+.4f}"

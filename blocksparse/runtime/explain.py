"""What runs each layer, and why: the answer of `Network.explain`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerChoice:
    """What runs one node, and why.

    Parameters
    ----------
    name, op : str
        The node.
    shape : tuple of int
        Shape of the node's value, batch axis excluded.
    density : float or None
        Nonzero fraction of the weight, 0..1; None for a node without one.
    kernel : str
        Name of what computes it: dtype, pattern, op.
    reason : str
        Why this one.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    density: float | None
    kernel: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """One row per node of the graph, in execution order; ``str()`` is a table.

    Parameters
    ----------
    engine : str
        Which engine, on what.
    rows : list of LayerChoice
        The nodes.
    """

    engine: str
    rows: list[LayerChoice]

    def __str__(self) -> str:
        cells = [("layer", "op", "shape", "density", "kernel", "reason")]
        for row in self.rows:
            density = "" if row.density is None else f"{row.density:.3f}"
            shape = "x".join(map(str, row.shape))
            cells.append((row.name, row.op, shape, density, row.kernel, row.reason))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        )
        return "\n".join([self.engine, *lines])

"""A sensitivity scan as a picture: layers by sparsity, coloured by the loss they add."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from blocksparse.sparsity.sensitivity import Row
from blocksparse.whole_file import draft_of

__all__ = ["save_plot"]

COLUMNS = 400  # of the picture's grid, over sparsity 0..1
LEAST = 1e-3  # nats; less is noise, and drawn alike


def save_plot(rows: Sequence[Row], pattern: str, name: str, path: Path) -> None:
    """Draw a heat map and write it as PNG, whole or not at all.

    Parameters
    ----------
    rows
        Of a finished scan, the dense network first.
    pattern, name
        For the title.
    path
        Of the PNG.
    """
    dense, others = rows[0], rows[1:]
    layers = list(dict.fromkeys(row.layer for row in others))
    values = np.full((len(layers), COLUMNS), np.nan)
    for row in sorted(others, key=lambda row: -row.sparsity):
        # From the level before up to its own; what no level reaches stays empty.
        last = round(row.sparsity * COLUMNS)
        values[layers.index(row.layer), :last] = max(row.loss - dense.loss, LEAST)
    figure = Figure(figsize=(8, 2 + 0.22 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="lightgrey")
    highest = max(float(np.nanmax(values)), 10 * LEAST)
    image = axes.imshow(
        values,
        aspect="auto",
        cmap=colours,
        norm=LogNorm(LEAST, highest),
        extent=(0, 100, len(layers) - 0.5, -0.5),
        interpolation="nearest",
    )
    axes.set_yticks(range(len(layers)), [layer or "(the network)" for layer in layers], fontsize=8)
    axes.set_xlabel("sparsity of this layer alone, % (grey: more than its floors or levels allow)")
    axes.set_title(
        f"{name}: {pattern}, one layer pruned, no training\n"
        f"dense: loss {dense.loss:.3f} nats, accuracy {dense.accuracy:.2%}",
        fontsize=10,
    )
    figure.colorbar(image, ax=axes, label="loss added, nats")
    with draft_of(path) as draft:
        figure.savefig(draft, dpi=120, format="png")

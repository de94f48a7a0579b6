"""Curves over sparsity: a layer's loss or time between the sparsities where it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from blocksparse.sparsity.sensitivity import Row


@dataclass(frozen=True)
class Curve:
    """A quantity of one layer by its sparsity, straight between measured points.

    Parameters
    ----------
    sparsities : tuple of float
        Rising, 0..1.
    values : tuple of float
        One for each.

    Examples
    --------
    >>> Curve((0.0, 0.5), (0.0, 1.0)).at(0.25)
    0.5
    """

    sparsities: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, sparsity: float) -> float:
        """Return the value at ``sparsity``; above the last point, the last slope goes on."""
        if len(self.sparsities) > 1 and sparsity > self.sparsities[-1]:
            (low, high), (before, last) = self.sparsities[-2:], self.values[-2:]
            return last + (sparsity - high) * (last - before) / (high - low)
        return float(np.interp(sparsity, self.sparsities, self.values))


def loss_curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """Return the loss that each layer adds by its sparsity, from a scan.

    On few images a sparser layer may seem to cost less. The curve is the rising one that is nearest
    in squares (isotonic regression), from 0 at sparsity 0.

    Parameters
    ----------
    rows : sequence of Row
        Of a finished scan, the dense network first.

    Returns
    -------
    dict of str to Curve
        Nats, by layer.
    """
    dense = rows[0].loss
    layers: dict[str, list[Row]] = {}
    for row in rows[1:]:
        layers.setdefault(row.layer, []).append(row)
    curves = {}
    for name, found in layers.items():
        found = sorted(found, key=lambda row: row.sparsity)
        rising = isotonic_regression([row.loss - dense for row in found]).x
        curves[name] = Curve(
            (0.0, *(row.sparsity for row in found)),
            (0.0, *np.maximum(rising, 0.0).tolist()),
        )
    return curves

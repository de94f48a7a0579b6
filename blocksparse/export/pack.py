"""From the folded and fused draft to the model that the file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from blocksparse.export.draft import Draft, DraftNode
from blocksparse.export.errors import WeightError
from blocksparse.export.layouts import choose
from blocksparse.export.report import LayerRow
from blocksparse.format import Graph, Model, Node, Preprocessing, ValueSpec, Weight
from blocksparse.format.metadata import as_stored
from blocksparse.sparsity.patterns import Pattern

_TOGETHER = 2**18
"""Weights that are looked at at once."""


@dataclass(frozen=True)
class Packed:
    """A model ready to be written.

    Attributes
    ----------
    model : Model
    layers : tuple of LayerRow
        One per weight, in execution order.
    dense_bytes : int
        Bytes of the same network with every weight stored densely.
    flushed : int
        Values below the smallest normal float32 that became zero.
    """

    model: Model
    layers: tuple[LayerRow, ...]
    dense_bytes: int
    flushed: int


def pack(
    draft: Draft,
    *,
    patterns: Mapping[str, Pattern] | None = None,
    block: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Packed:
    """Round to float32, flush what is not normal to zero, and choose each weight's layout.

    Parameters
    ----------
    draft : Draft
    patterns : mapping of parameter name to Pattern, optional
    block : (int, int), optional
        BSR block of every sparse layer, whatever its pattern.
    classes, preprocessing, provenance
        As in `blocksparse.format.Model`.

    Returns
    -------
    Packed

    Raises
    ------
    WeightError
        A bias, scale or shift is beyond float32.
    FormatError
        The provenance cannot be said in JSON.
    """
    weights: dict[str, Weight] = {}
    vectors: dict[str, npt.NDArray[np.float32]] = {}
    layers = []
    flushed = 0
    for node in draft:
        for role in ("bias", "scale", "shift"):
            values = getattr(node, role)
            if values is not None:
                vector, count = _flush(_round(f"{node.name}.{role}", values))
                vectors[f"{node.name}.{role}"] = vector
                flushed += count
        if node.weight is not None:
            dense, count = _flush(node.weight)
            flushed += count
            pattern = (patterns or {}).get(node.parameter or "")
            weights[node.name], row = _store(node, dense, pattern, block)
            layers.append(row)
    model = Model(
        graph=_graph(draft),
        weights=weights,
        vectors=vectors,
        classes=None if classes is None else tuple(classes),
        preprocessing=preprocessing,
        # As it is read again, so that the file can be compared with what was written into it.
        provenance=as_stored(provenance or {}),
    )
    dense_bytes = sum(row.dense_bytes for row in layers) + sum(v.nbytes for v in vectors.values())
    return Packed(model, tuple(layers), dense_bytes, flushed)


def _store(
    node: DraftNode,
    dense: npt.NDArray[np.float32],
    pattern: Pattern | None,
    block: tuple[int, int] | None,
) -> tuple[Weight, LayerRow]:
    choice, reason = choose(dense, node.attrs.get("groups", 1), pattern, block)
    weight = choice.build(dense)
    row = LayerRow(
        name=node.name,
        op=node.op,
        shape=tuple(dense.shape),
        layout=choice.label,
        density=float(np.count_nonzero(dense) / dense.size),
        bytes=weight.nbytes_values + weight.nbytes_indices,
        dense_bytes=4 * prod(dense.shape),
        reason=reason,
    )
    return weight, row


def _graph(draft: Draft) -> Graph:
    nodes = tuple(
        Node(node.name, node.op, tuple(node.inputs), dict(node.attrs), node.shape) for node in draft
    )
    return Graph((ValueSpec(draft.input_name, draft.input_shape),), (draft.output,), nodes)


def _round(name: str, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        rounded = np.array(values, np.float32)
    if not np.isfinite(rounded).all():
        raise WeightError(
            f"{name}: folding the batch norm gives values beyond float32; a running variance is "
            "close to zero or a statistic far too large: re-estimate the statistics"
        )
    return rounded


def _flush(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], int]:
    """Zero what is below the smallest normal float32, which CPUs compute with very slowly."""
    least = np.finfo(np.float32).tiny
    flat = np.ascontiguousarray(values).reshape(-1)
    count = 0
    for first in range(0, flat.size, _TOGETHER):  # all at once: as large as the layer
        part = flat[first : first + _TOGETHER]
        count += int(np.count_nonzero((np.abs(part) < least) & (part != 0)))
    return (np.where(np.abs(values) < least, np.float32(0), values) if count else values), count

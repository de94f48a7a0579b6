"""Batch norm, and any other scale and shift per channel, folded into the layer before it.

Legend: K out-channels, C channels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blocksparse.export.draft import Draft, DraftNode
from blocksparse.export.errors import WeightError


def fold(draft: Draft) -> None:
    """Fold every affine node whose input is a convolution, linear layer or affine it alone reads.

    Products are taken in float64 and weights rounded to float32 once, in place of the draft's nodes
    (new arrays: the captured model is not written to). Zeros stay exactly zero. An affine node that
    cannot be folded stays; one that does nothing goes. Run before `blocksparse.export.fuse.fuse`,
    while no layer has an activation or a residual yet.

    Parameters
    ----------
    draft : Draft
        Changed in place.

    Raises
    ------
    WeightError
        A folded weight or bias is too large for float32.
    """
    for node in draft:
        if node.op != "affine":
            continue
        source = draft.nodes.get(node.inputs[0])
        if source is None or source.op not in ("conv2d", "linear", "affine"):
            continue
        if draft.sole_user(source.name) is node:
            _absorb(source, node)
            draft.bypass(node)
    for node in draft:
        if node.op == "affine" and np.all(_scale(node) == 1) and np.all(_shift(node) == 0):
            draft.bypass(node)


def _absorb(node: DraftNode, affine: DraftNode) -> None:
    scale, shift = _scale(affine), _shift(affine)
    if node.op == "affine":
        node.scale = _scale(node) * scale
        node.shift = _shift(node) * scale + shift
        return
    assert node.weight is not None
    columns = scale.reshape(-1, *[1] * (node.weight.ndim - 1))
    with np.errstate(over="ignore"):
        # Adding 0.0 turns the -0.0 that a negative scale makes of a pruned entry into 0.0.
        node.weight = (node.weight * columns).astype(np.float32) + np.float32(0)
    bias = 0.0 if node.bias is None else node.bias
    node.bias = bias * scale + shift
    if not np.isfinite(node.weight).all():
        raise WeightError(
            f"{node.parameter or node.name}: folding the batch norm after it gives values beyond "
            f"float32 (its largest scale is {np.abs(scale).max():.3g}); a running variance is "
            "close to zero or a weight is far too large: re-estimate the statistics"
        )


def _scale(node: DraftNode) -> npt.NDArray[np.float64]:
    assert node.scale is not None
    return node.scale


def _shift(node: DraftNode) -> npt.NDArray[np.float64]:
    assert node.shift is not None
    return node.shift

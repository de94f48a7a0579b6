"""Masks: True where a weight is kept, of the weight's shape; from weights, and as packed bits."""

# U units

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from blocksparse.sparsity.allocation import share_of, weights_for
from blocksparse.sparsity.patterns import Pattern, Units
from blocksparse.sparsity.plan import Plan
from blocksparse.sparsity.scores import Score, l2, movement
from blocksparse.sparsity.selection import Floors, keep_units, protect


def layer_mask(
    weight: Tensor,
    pattern: Pattern,
    sparsity: float,
    score: Score = l2,
    floors: Floors | None = None,
) -> Tensor:
    """Build the mask of one weight.

    Parameters
    ----------
    weight : Tensor
        [K, C, ...] of a convolution or [O, I] of a linear layer, any float dtype, any device.
    pattern : Pattern
        What may be zero together.
    sparsity : float
        The mask has at least this fraction of zeros, and less than one unit more. N:M: counted as a
        fraction of what the pattern gives, so 1 - n/m means that every group obeys.
    score : Score
        What ranks the units.
    floors : Floors, optional
        What stays in any case; default: nothing.

    Returns
    -------
    Tensor
        bool, the shape and device of ``weight``, True where the weight is kept.

    Raises
    ------
    ValueError
        If the pattern cannot give ``sparsity``, the floors do not allow it, or a weight is not
        finite.

    Examples
    --------
    >>> from blocksparse.sparsity import Block
    >>> layer_mask(torch.tensor([[1.0, 3.0, 2.0, 4.0]]), Block(1, 2), 0.5).tolist()
    [[False, False, True, True]]
    """
    floors = floors or Floors(min_density=0.0, keep_channels=False)
    units = _finite_units(weight, pattern, score, "weight")
    zeros = weights_for(share_of(sparsity, pattern.limit), int(units.size.sum()))
    shape = tuple(weight.shape)
    protected = protect(pattern, shape, units.importance, units.size, floors, zeros)
    return units.mask(keep_units(units.importance, units.size, protected, zeros)).to(weight.device)


def plan_masks(plan: Plan, weights: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Build the masks of all pruned layers after ``share`` of the ramp.

    Parameters
    ----------
    plan : Plan
        What happens to every layer.
    weights : mapping of str to Tensor
        The pruned parameters by name, as `Plan.weights` gives them.
    share : float
        How much of the way from the initial to the final zeros is done, 0..1.

    Returns
    -------
    dict of str to Tensor
        bool masks by parameter name, each of the shape and device of its weight.

    Raises
    ------
    ValueError
        If a weight is not finite.
    """
    units, protected, wanted = {}, {}, {}
    for layer in plan.pruned:
        zeros = None if layer.zeros is None else _between(layer.start, layer.zeros, share)
        found = _finite_units(weights[layer.param], plan.pattern, plan.score, layer.param)
        units[layer.param] = found
        protected[layer.param] = protect(
            plan.pattern, layer.shape, found.importance, found.size, plan.floors, zeros
        )
        if zeros is not None:
            wanted[layer.param] = zeros
    keeps = {
        param: keep_units(units[param].importance, units[param].size, protected[param], zeros)
        for param, zeros in wanted.items()
    }
    if not plan.shared_out:
        keeps = _keep_globally(plan, weights, units, protected, share)
    return {
        param: units[param].mask(keep).to(weights[param].device) for param, keep in keeps.items()
    }


def _keep_globally(
    plan: Plan,
    weights: Mapping[str, Tensor],
    units: Mapping[str, Units],
    protected: Mapping[str, Tensor],
    share: float,
) -> dict[str, Tensor]:
    """Choose among the units of all layers at once; see `allocation.Global`."""
    relative = []
    for layer in plan.pruned:
        if plan.score == movement:
            # What the loss gains compares between layers, and has no zero to be a share of.
            relative.append(units[layer.param].importance)
            continue
        weight = weights[layer.param]
        terms = plan.score.terms(weight)
        scale = plan.score.root(terms.sum(), max(int(torch.count_nonzero(terms)), 1))
        relative.append(units[layer.param].importance / scale.clamp(min=1e-30))
    zeros = _between(sum(layer.start for layer in plan.pruned), plan.zeros, share)
    params = [layer.param for layer in plan.pruned]
    keep = keep_units(
        torch.cat(relative),
        torch.cat([units[param].size for param in params]),
        torch.cat([protected[param] for param in params]),
        zeros,
    )
    pieces = keep.split([len(units[param].size) for param in params])
    return dict(zip(params, pieces, strict=True))


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask into bits: uint8 [ceil(entries / 8)] on the CPU, the first entry lowest.

    Entries are taken in row-major order; the last byte is filled up with zeros.
    """
    bits = mask.detach().cpu().contiguous().numpy().reshape(-1)
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the bool mask of ``shape``, on the CPU, that `pack_mask` packed.

    Raises
    ------
    ValueError
        If the number of bytes is not that of a mask of ``shape``.
    """
    entries = math.prod(shape)
    if packed.numel() != -(-entries // 8):
        raise ValueError(
            f"a mask of shape {shape} packs into {-(-entries // 8)} bytes, not {packed.numel()}"
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=entries, bitorder="little")
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def _between(start: int, end: int, share: float) -> int:
    """Return the zeros after ``share`` of the way from ``start`` to ``end``; exact at both ends."""
    return math.ceil(round((1.0 - share) * start + share * end, 6))


def _finite_units(weight: Tensor, pattern: Pattern, score: Score, name: str) -> Units:
    units = pattern.units(weight, score)
    if not bool(units.importance.isfinite().all()):
        raise ValueError(
            f"{name}: holds NaN or infinite weights, so nothing can be ranked. The training "
            "diverged: lower the learning rate or clip the gradients"
        )
    return units

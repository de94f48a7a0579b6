"""Resolving: from a network and what is asked for to a plan, or an error that says why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from blocksparse.sparsity.allocation import (
    Allocation,
    Candidate,
    Uniform,
    Unreachable,
    weights_for,
)
from blocksparse.sparsity.layers import FoundLayer, Layers, find_layers
from blocksparse.sparsity.patterns import Block, Pattern
from blocksparse.sparsity.plan import TARGET_ZERO, LayerPlan, Plan
from blocksparse.sparsity.scores import Score, l2
from blocksparse.sparsity.selection import Floors, most_zeros, protect

FROM_MODEL = "from_model"


def resolve(
    network: nn.Module,
    *,
    target: float,
    pattern: Pattern | None = None,
    score: Score = l2,
    allocation: Allocation | None = None,
    floors: Floors | None = None,
    layers: Layers | None = None,
    initial: float | str = 0.0,
) -> Plan:
    """Settle what happens to every layer of ``network``.

    Parameters
    ----------
    network : nn.Module
        Its weights count only with ``initial="from_model"``.
    target : float
        Sparsity of the prunable weights at the end, 0..1. 0 prunes nothing.
    pattern : Pattern, optional
        Default: `Block` of 8x8, shared over the kernel positions.
    score : Score
        What ranks the units.
    allocation : Allocation, optional
        Default: `Uniform`.
    floors : Floors, optional
        What every layer keeps.
    layers : Layers, optional
        Which layers may be pruned.
    initial : float or "from_model"
        Sparsity to begin with. "from_model": per layer, what the network already has; only units
        that are wholly zero, and N:M groups that already obey, count. A layer that already has more
        than its target keeps what it has.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If nothing can be pruned, a glob matches no layer, or the target cannot be reached; the text
        lists the candidates.

    Examples
    --------
    >>> network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(32, 10))
    >>> plan = resolve(network, target=0.5)
    >>> [(layer.name, layer.target, layer.reason) for layer in plan.layers]
    [('0', 0.0, 'first convolution'), ('1', 0.5, ''), ('2', 0.0, 'classifier')]
    """
    pattern = pattern or Block()
    allocation = allocation or Uniform()
    floors = floors or Floors()
    if not 0.0 <= target <= 1.0:
        raise ValueError(f"sparsity.target is a fraction in 0..1, not {target}")
    found = find_layers(network, layers or Layers())
    found = [_with_room(layer, pattern, floors) for layer in found]
    allocation.check(found, pattern)
    target = allocation.overall(target)
    candidates = [
        Candidate(
            layer.name,
            int(pattern.sizes(layer.shape).sum()),
            most_zeros(pattern, layer.shape, floors),
            layer.shape,
        )
        for layer in found
        if not layer.reason
    ]
    if not candidates and target > 0:
        listed = "; ".join(f"{layer.name}: {layer.reason}" for layer in found)
        raise ValueError(f"no layer is left to prune with {pattern}. The layers are: {listed}")
    try:
        goals = allocation.zeros(candidates, target, pattern.limit)
        starts = _starts(network, candidates, pattern, score, floors, initial, target)
    except Unreachable as error:
        raise ValueError(
            f"sparsity target {target:g} cannot be reached. With {pattern}, the floors "
            f"(keep_channels={floors.keep_channels}, min_density={floors.min_density:g}) allow "
            f"{error}. Lower the target, take smaller blocks or one choice per kernel position "
            "(sparsity=block8x8_per_position), widen the network, or loosen sparsity.keep_channels "
            "or sparsity.min_density"
        ) from error
    by_name = {
        candidate.name: (candidate, goal, start)
        for candidate, goal, start in zip(candidates, goals, starts, strict=True)
    }
    rows = tuple(_row(layer, by_name, target, pattern, initial == FROM_MODEL) for layer in found)
    total = sum(layer.zeros or 0 for layer in rows)
    if any(layer.zeros is None for layer in rows):
        share = weights_for(target / pattern.limit, sum(candidate.full for candidate in candidates))
        total = max(share, sum(layer.start for layer in rows))
    return Plan(
        layers=rows,
        pattern=pattern,
        score=score,
        floors=floors,
        target=target,
        zeros=total,
        parameters=sum(param.numel() for param in network.parameters()),
    )


def _with_room(layer: FoundLayer, pattern: Pattern, floors: Floors) -> FoundLayer:
    """Give a layer with nothing to drop the reason."""
    if layer.reason:
        return layer
    if int(pattern.sizes(layer.shape).sum()) == 0:
        return replace(layer, reason=f"no group has more inputs than {pattern} keeps")
    if most_zeros(pattern, layer.shape, floors) == 0:
        return replace(layer, reason=f"the floors keep every unit of {pattern}")
    return layer


def _row(
    layer: FoundLayer,
    by_name: Mapping[str, tuple[Candidate, int | None, int]],
    target: float,
    pattern: Pattern,
    from_model: bool,
) -> LayerPlan:
    row = LayerPlan(layer.name, layer.kind, layer.shape, pruned=False, reason=layer.reason)
    if layer.reason:
        return row
    candidate, goal, start = by_name[layer.name]
    reason = ""
    if goal is not None:
        if goal == 0 and not (from_model and start):
            return replace(row, reason=TARGET_ZERO)
        if goal == candidate.most and goal < weights_for(target / pattern.limit, candidate.full):
            reason = "held back by the floors"
        if start > goal and from_model:
            reason = "already has this much"
            goal = start
        if not reason and pattern.limit < 1.0 and goal < candidate.full:
            reason = f"not all groups reach {pattern}: stored as dense"
        start = min(start, goal)
    return replace(row, pruned=True, reason=reason, start=start, zeros=goal)


def _starts(
    network: nn.Module,
    candidates: list[Candidate],
    pattern: Pattern,
    score: Score,
    floors: Floors,
    initial: float | str,
    target: float,
) -> list[int]:
    """Return the zeros each candidate begins with."""
    if isinstance(initial, str):
        if initial != FROM_MODEL:
            raise ValueError(f"sparsity.initial is a number or {FROM_MODEL!r}, not {initial!r}")
        starts = []
        for candidate in candidates:
            weight: Tensor = network.get_submodule(candidate.name).weight  # type: ignore[assignment]
            units = pattern.units(weight, score)
            # A zero unit that the floors keep is kept: it counts for nothing and may grow again.
            kept = protect(pattern, tuple(weight.shape), units.importance, units.size, floors)
            zero = (units.importance == 0) & ~kept
            starts.append(min(int(units.size[zero].sum()), candidate.most))
        return starts
    if not 0.0 <= initial <= target:
        raise ValueError(
            f"sparsity.initial is {initial}; it lies between 0 and the target {target}, or is "
            f"{FROM_MODEL!r}"
        )
    return [
        min(weights_for(initial / pattern.limit, candidate.full), candidate.most)
        for candidate in candidates
    ]

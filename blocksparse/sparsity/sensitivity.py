"""Sensitivity: what pruning one layer alone costs, at every level, without training.

One layer at a time is pruned to each level, the network is evaluated, and the layer gets its
weights back. What all layers cost together is more than the sum of that, and training wins much of
it back; but which layer is easy to prune and which is not shows. (The per-layer analysis of Li et
al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, section 3.1, with the loss beside
the accuracy, which on few images resolves more.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from blocksparse.sparsity.allocation import Candidate, weights_for
from blocksparse.sparsity.masks import plan_masks
from blocksparse.sparsity.plan import LayerPlan, Plan
from blocksparse.sparsity.selection import most_zeros

DENSE = "(dense)"
"""What stands for the layer in the row of the dense network; no module can have this name."""

Evaluate = Callable[[nn.Module], tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """One layer at one sparsity, still to be evaluated.

    Parameters
    ----------
    layer : str
        Its module name, or `DENSE` for the network as it is.
    weights : int
        How many weights the layer has; for `DENSE`, all prunable layers together.
    sparsity : float
        The share of them that is zero, 0..1: counted, not what was asked for.
    zeros : int
        What its mask is asked for.
    """

    layer: str
    weights: int
    sparsity: float
    zeros: int


@dataclass(frozen=True)
class Row:
    """What one layer at one sparsity costs.

    Parameters
    ----------
    layer, weights, sparsity
        As in `Point`.
    loss : float
        Mean cross entropy, in nats.
    accuracy : float
        Share of images classified correctly, 0..1.
    drop : float
        Accuracy lost against the dense network, 0..1; below 0 where it gained.
    """

    layer: str
    weights: int
    sparsity: float
    loss: float
    accuracy: float
    drop: float

    @property
    def key(self) -> tuple[str, float]:
        """What tells it from other rows: layer, and sparsity as files hold it."""
        return self.layer, round(self.sparsity, 6)


def candidates(plan: Plan) -> list[Candidate]:
    """Return the layers that ``plan`` prunes as an allocation sees them."""
    return [
        Candidate(
            layer.name,
            int(plan.pattern.sizes(layer.shape).sum()),
            most_zeros(plan.pattern, layer.shape, plan.floors),
            layer.shape,
        )
        for layer in plan.pruned
    ]


def points(network: nn.Module, plan: Plan, levels: Sequence[float]) -> list[Point]:
    """List what a scan evaluates: the dense network, then layer by layer by rising sparsity.

    A narrow layer has few blocks, and its floors keep some of them, so several levels may come to
    the same; each is listed once. Levels above what the pattern can give are left out.

    Raises
    ------
    ValueError
        If no level is given that the pattern can have, or one is not in 0..1.
    """
    for level in levels:
        if not 0.0 < level <= 1.0:
            raise ValueError(f"level {level:g} is not a sparsity above 0 and at most 1")
    shares = sorted({level / plan.pattern.limit for level in levels})
    shares = [share for share in shares if share <= 1.0 + 1e-9]
    if not shares:
        raise ValueError(
            f"levels {list(levels)}: {plan.pattern} gives at most {plan.pattern.limit:g}; list at "
            "least one level up to that"
        )
    result = [Point(DENSE, plan.prunable, 0.0, 0)]
    rooms = {candidate.name: candidate for candidate in candidates(plan)}
    for layer in plan.pruned:
        room, seen = rooms[layer.name], {0.0}
        for share in shares:
            zeros = min(weights_for(min(share, 1.0), room.full), room.most)
            mask = _mask(network, plan, layer, zeros)
            sparsity = 1.0 - int(mask.sum()) / layer.size
            if sparsity not in seen:
                seen.add(sparsity)
                result.append(Point(layer.name, layer.size, sparsity, zeros))
    return result


def scan(
    network: nn.Module,
    plan: Plan,
    todo: Sequence[Point],
    evaluate: Evaluate,
    known: Collection[Row] = (),
) -> Iterator[Row]:
    """Evaluate a network with one layer pruned at a time.

    Parameters
    ----------
    network : nn.Module
        With its weights. A copy is pruned; this one stays as it is.
    plan : Plan
        Pattern, score and floors, and the layers to prune; its sparsities do not count.
    todo : sequence of Point
        From `points`.
    evaluate : callable
        Takes the pruned copy, on the device of ``network``, and returns its loss and accuracy. What
        it does to parameters and buffers is undone. It is where batch-norm statistics are
        re-estimated; for the dense network too, or the difference would show in every row.
    known : collection of Row
        From an earlier scan that was broken off: these are given again and not evaluated.

    Yields
    ------
    Row
        One per point, in their order.
    """
    trial = copy.deepcopy(network)
    before = copy.deepcopy(trial.state_dict())
    rows = {row.key: row for row in known}
    layers = {layer.name: layer for layer in plan.pruned}
    dense: float | None = None
    for point in todo:
        row = rows.get((point.layer, round(point.sparsity, 6)))
        if row is None:
            if point.layer != DENSE:
                layer = layers[point.layer]
                with torch.no_grad():
                    weight = plan.weights(trial)[layer.param]
                    weight.mul_(_mask(trial, plan, layer, point.zeros))
            # As a file holds them, so that a scan that was gone on with gives the same rows.
            loss, accuracy = (round(value, 6) for value in evaluate(trial))
            trial.load_state_dict(before)
            drop = 0.0 if dense is None else round(dense - accuracy, 6)
            row = Row(point.layer, point.weights, point.sparsity, loss, accuracy, drop)
        if row.layer == DENSE:
            dense = row.accuracy
        yield row


def _mask(network: nn.Module, plan: Plan, layer: LayerPlan, zeros: int) -> Tensor:
    alone = replace(plan, layers=(replace(layer, start=0, zeros=zeros),), zeros=zeros)
    return plan_masks(alone, alone.weights(network), 1.0)[layer.param]

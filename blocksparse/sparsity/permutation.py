"""Permutation: put channels into an order in which a pattern keeps more of the weights.

Blocks and N:M groups cover neighbouring channels, and which channels are neighbours is an accident
of initialisation. Here strands of channels (see `channels`) are exchanged as long as the layers
keep more of their energy under the masks that a plan will choose. The network computes the same
function, and the order costs nothing at run time. "Channel Permutations for N:M Sparsity" (Pool and
Yu, NeurIPS 2021) does this for N:M; Shfl-BW (arXiv 2203.05016) shuffles rows for blocks.
"""

# n strands of a group

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from blocksparse.sparsity.channels import Group, find_channels, reorder
from blocksparse.sparsity.masks import plan_masks
from blocksparse.sparsity.permutation_report import KeptScore, PermutationReport
from blocksparse.sparsity.placement import Layer, Term, best_mates
from blocksparse.sparsity.plan import Plan

logger = logging.getLogger(__name__)

# Differences looked at to weigh all exchanges in a group once; beyond, units are sampled.
_MOST_WORK = 1_000_000_000
_LEAST_UNITS = 32
# Energy, as a share of a layer's, below which an exchange is not worth making.
_LEAST_GAIN = 1e-7
_MOST_ROUNDS = 500


@dataclass(frozen=True)
class _Spot:
    """Where a group lies in a layer that is pruned."""

    layer: Layer
    axis: int
    places: np.ndarray


def permute(
    network: nn.Module, plan: Plan, input_shape: Sequence[int], *, passes: int = 2
) -> PermutationReport:
    """Reorder the channels of ``network``, in place, for what ``plan`` will prune.

    What is maximised is the mean over the pruned layers of the share of its score that each keeps
    at its final target: sum of ``|w|^p`` over the weights kept, by that over all. The search starts
    with the channels of each group sorted by their energy, and exchanges pairs, the ones that gain
    most first. What comes out is measured with the plan's own masks, floors included; if it does
    not keep more than the network as it was, the network stays as it is.

    Parameters
    ----------
    network : nn.Module
        Takes one float tensor [N, *input_shape]. Its inputs and outputs keep their order; it
        computes the same function up to the order of sums.
    plan : Plan
        What `resolve` said for this network.
    input_shape : sequence of int
        Of one image, (C, H, W).
    passes : int
        How often every group is gone through, at least 1.

    Returns
    -------
    PermutationReport
        What every layer keeps before and after.

    Raises
    ------
    ValueError
        If ``plan`` is another network's, a weight is not finite, or ``passes`` is below 1.
    """
    if passes < 1:
        raise ValueError(f"permutation.passes is {passes}: at least 1")
    started = time.perf_counter()
    weights = {name: weight.detach().cpu() for name, weight in plan.weights(network).items()}
    masks = plan_masks(plan, weights, 1.0)
    kept_before = _kept(plan, weights, masks)
    channels = find_channels(network, input_shape)
    layers = {
        layer.param: Layer(
            plan.score.terms(weights[layer.param]).reshape(*layer.shape[:2], -1).float().numpy(),
            plan.pattern,
            int((~masks[layer.param]).sum()),
            plan.floors.keep_channels,
        )
        for layer in plan.pruned
    }
    orders = {
        number: order
        for number, order in _search(channels.groups, layers, passes).items()
        if not np.array_equal(order, np.arange(len(order)))
    }
    for number, order in orders.items():
        reorder(network, channels.groups[number], order)
    weights = {name: weight.detach().cpu() for name, weight in plan.weights(network).items()}
    kept_after = _kept(plan, weights, plan_masks(plan, weights, 1.0))
    if sum(kept_after.values()) <= sum(kept_before.values()):
        for number, order in orders.items():
            reorder(network, channels.groups[number], np.argsort(order))
        orders, kept_after = {}, kept_before
    report = PermutationReport(
        layers=tuple(
            KeptScore(layer.name, kept_before[layer.param], kept_after[layer.param])
            for layer in plan.pruned
        ),
        pattern=str(plan.pattern),
        target=plan.target,
        channels=sum(group.size for group in channels.groups),
        moved=sum(int((order != np.arange(len(order))).sum()) for order in orders.values()),
        fixed=dict(channels.fixed),
        seconds=time.perf_counter() - started,
    )
    logger.info("%s", report.summary())
    return report


def _kept(
    plan: Plan, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the share of its score that each layer keeps, by parameter."""
    shares = {}
    for param, mask in masks.items():
        terms = plan.score.terms(weights[param])
        shares[param] = float((terms * mask).sum() / terms.sum().clamp(min=1e-30))
    return shares


def _search(
    groups: Sequence[Group], layers: Mapping[str, Layer], passes: int
) -> dict[int, np.ndarray]:
    """Return an order for each group that matters to a layer, by its number; reorder ``layers``."""
    spots: dict[int, list[_Spot]] = {}
    for number, group in enumerate(groups):
        # A flatten spreads a channel over many columns, which the neighbours of the channel then
        # hardly change: such columns move with it, and have no say.
        found = [
            _Spot(layers[place.name], place.axis, place.positions[:, 0])
            for place in group.places
            if place.name in layers and place.positions.shape[1] == 1
        ]
        if found:
            spots[number] = found
    orders = {}
    for number, found in spots.items():
        energy = sum(
            spot.layer.energy.sum(tuple({0, 1, 2} - {spot.axis}))[spot.places] for spot in found
        )
        orders[number] = np.argsort(-energy, kind="stable")
        _reorder(found, orders[number])
    for _ in range(passes):
        for number, found in spots.items():
            order = _improve(found, groups[number].size)
            if order is not None:
                orders[number] = orders[number][order]
    return orders


def _reorder(spots: Iterable[_Spot], order: np.ndarray) -> None:
    for spot in spots:
        spot.layer.reorder(spot.axis, spot.places, order)


def _improve(spots: Sequence[_Spot], size: int) -> np.ndarray | None:
    """Reorder a group so that its layers keep more; return the order, None if there is none.

    The bounds of the layers are held during the exchanges, so what is gained is measured after.
    """
    most = max(_MOST_WORK // (size * size * len(spots)), _LEAST_UNITS)
    terms = [spot.layer.term(spot.axis, spot.places, most) for spot in spots]
    order = exchange([term for term in terms if term is not None], size)
    if np.array_equal(order, np.arange(size)):
        return None
    layers = list({id(spot.layer): spot.layer for spot in spots}.values())
    before, kept = [layer.energy for layer in layers], sum(layer.kept() for layer in layers)
    _reorder(spots, order)
    if sum(layer.kept() for layer in layers) > kept:
        return order
    for layer, energy in zip(layers, before, strict=True):
        layer.energy = energy
    return None


def exchange(terms: Sequence[Term], size: int) -> np.ndarray:
    """Exchange strands, the pairs that gain most first, until no exchange gains.

    In every round, exchanges are made that share no bin, so that their gains add up.

    Parameters
    ----------
    terms : sequence of Term
        What the layers say; they are changed.
    size : int
        n, how many strands there are.

    Returns
    -------
    ndarray
        int64 [n]: the strand that comes to each place.
    """
    order = np.arange(size)
    cuts: list[np.ndarray] = []  # the ways in which the layers cut the places into bins
    for term in terms:
        if not any(np.array_equal(term.bins, bins) for bins in cuts):
            cuts.append(term.bins)
    if not cuts:
        return order
    stacked = np.stack(cuts)
    worth = np.zeros((size, size), dtype=np.float32)
    stale = order.copy()
    for _ in range(_MOST_ROUNDS):
        worth[stale] = 0.0
        for term in terms:
            term.add_worth(stale, worth)
        mates, gains = best_mates(worth, stacked)
        one, other, used = _disjoint(mates, gains, cuts)
        if not len(one):
            break
        for term in terms:
            term.swap(one, other)
        at, to = np.r_[one, other], np.r_[other, one]
        order[at] = order[to]
        worth[:, at] = worth[:, to]
        stale = np.flatnonzero(used)
    return order


def _disjoint(
    mates: np.ndarray, gains: np.ndarray, cuts: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose exchanges that share no bin, greedily; also say which places lie in their bins."""
    taken = [np.zeros(int(bins.max()) + 1, dtype=bool) for bins in cuts]
    one, other = [], []
    for place in np.argsort(-gains, kind="stable").tolist():
        if gains[place] <= _LEAST_GAIN:
            break
        mate = int(mates[place])
        pairs = list(zip(taken, cuts, strict=True))
        if any(full[bins[place]] or full[bins[mate]] for full, bins in pairs):
            continue
        for full, bins in pairs:
            full[bins[[place, mate]]] = True
        one.append(place)
        other.append(mate)
    used = np.any([full[bins] for full, bins in zip(taken, cuts, strict=True)], axis=0)
    return np.array(one, dtype=np.int64), np.array(other, dtype=np.int64), used

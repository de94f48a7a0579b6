"""What each layer may be pruned to, from a scan; and what other rules would choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from blocksparse.sparsity import Allocation, Plan, plan_masks
from blocksparse.sparsity.allocation import Unreachable, weights_for
from blocksparse.sparsity.allocation_file import StoredLayer, write_allocation
from blocksparse.sparsity.curves import Curve, loss_curves
from blocksparse.sparsity.knapsack import Limit, Solution, solve
from blocksparse.sparsity.sensitivity import DENSE, Row, candidates, points

__all__ = [
    "Choices",
    "CostLimit",
    "at_least",
    "counted_sparsities",
    "matched",
    "save_allocation",
    "with_zeros",
]

STEPS = 24  # of a bisection: targets to a ten-millionth


@dataclass(frozen=True)
class Choices:
    """The sparsities each layer can take, dense first, and the loss that each is predicted to add.

    Parameters
    ----------
    sparsities
        By layer, rising from 0: those that were scanned and that the runtime has a layout for.
    losses
        By layer, nats, one for each.
    curves
        The same between those, for sparsities that other rules choose.
    """

    sparsities: Mapping[str, tuple[float, ...]]
    losses: Mapping[str, tuple[float, ...]]
    curves: Mapping[str, Curve]

    @classmethod
    def of(
        cls, network: nn.Module, plan: Plan, levels: Sequence[float], rows: Sequence[Row]
    ) -> Choices:
        """Return the choices that a finished scan at ``levels`` gives.

        Of N:M, only that all groups obey: a file stores a weight of which only some do as dense.
        """
        curves = loss_curves(rows)
        sparsities: dict[str, tuple[float, ...]] = {layer.name: (0.0,) for layer in plan.pruned}
        rooms = {candidate.name: candidate for candidate in candidates(plan)}
        for point in points(network, plan, levels):
            if point.layer == DENSE:
                continue
            if plan.pattern.limit == 1.0 or point.zeros == rooms[point.layer].full:
                sparsities[point.layer] += (point.sparsity,)
        losses = {
            name: tuple(curves[name].at(each) for each in found)
            for name, found in sparsities.items()
        }
        return cls(sparsities, losses, curves)

    def loss(self, sparsities: Mapping[str, float]) -> float:
        """Return the loss predicted for layers pruned together: the sum of what each adds alone."""
        return sum(self.curves[name].at(sparsity) for name, sparsity in sparsities.items())

    def cheapest(self, limits: Sequence[CostLimit]) -> tuple[dict[str, float], Solution]:
        """Return the sparsity of each layer with the least predicted loss within all limits.

        Raises
        ------
        Infeasible
            If nothing keeps within them.
        """
        # What does not depend on the choice is a group of its own with one choice.
        solution = solve(
            [(0.0,), *self.losses.values()],
            [
                Limit(
                    limit.name,
                    [
                        (limit.constant,),
                        *([limit.cost(name, s) for s in each] for name, each in self._items()),
                    ],
                    limit.most,
                )
                for limit in limits
            ],
        )
        chosen = {
            name: each[index]
            for (name, each), index in zip(self._items(), solution.chosen[1:], strict=True)
        }
        return chosen, solution

    def _items(self) -> list[tuple[str, tuple[float, ...]]]:
        return list(self.sparsities.items())


@dataclass(frozen=True)
class CostLimit:
    """A limit on the whole network, for `Choices.cheapest`.

    Parameters
    ----------
    name
        What is limited, with its unit.
    constant
        What the rest of the network costs.
    cost
        What a layer costs, by its name and sparsity.
    most
        For all together.
    """

    name: str
    constant: float
    cost: Callable[[str, float], float]
    most: float


def at_least(share: float, plan: Plan) -> CostLimit:
    """Return the limit that at least ``share``, 0..1, of the prunable weights go."""
    sizes = {layer.name: layer.size for layer in plan.pruned}
    return CostLimit(
        "prunable weights that go, negated",
        0.0,
        lambda name, sparsity: -sizes[name] * sparsity,
        -share * plan.prunable,
    )


def with_zeros(plan: Plan, sparsities: Mapping[str, float]) -> Plan:
    """Return ``plan`` with these sparsities instead of its own, as they were counted."""
    rooms = {candidate.name: candidate for candidate in candidates(plan)}
    layers = []
    for layer in plan.layers:
        if layer.pruned:
            # Where edges are ragged, a mask may have up to a block more than it is sure to have.
            zeros = min(round(sparsities[layer.name] * layer.size), rooms[layer.name].most)
            layer = replace(layer, start=0, zeros=zeros)
        layers.append(layer)
    return replace(plan, layers=tuple(layers), zeros=sum(layer.zeros or 0 for layer in layers))


def counted_sparsities(
    network: nn.Module, plan: Plan, allocation: Allocation, target: float
) -> dict[str, float]:
    """Return the sparsity of each layer that a rule prunes to ``target`` in all.

    Raises
    ------
    Unreachable
        If the floors do not leave enough.
    """
    rooms = candidates(plan)
    zeros = allocation.zeros(rooms, target, plan.pattern.limit)
    wanted = dict(zip((room.name for room in rooms), zeros, strict=True))
    total = weights_for(target / plan.pattern.limit, sum(room.full for room in rooms))
    layers = tuple(
        replace(layer, start=0, zeros=wanted[layer.name]) if layer.pruned else layer
        for layer in plan.layers
    )
    asked = replace(plan, layers=layers, zeros=total)
    masks = plan_masks(asked, plan.weights(network), 1.0)
    return {
        layer.name: (layer.size - int(masks[layer.param].sum())) / layer.size
        for layer in plan.pruned
    }


def matched(
    network: nn.Module,
    plan: Plan,
    allocation: Allocation,
    cost: Callable[[Mapping[str, float]], float],
    most: float,
) -> dict[str, float] | None:
    """Return what a rule chooses at the lowest target that costs at most ``most``, by bisection.

    None if it cannot cost so little.
    """
    low, high = 0.0, plan.pattern.limit
    best = None
    for _ in range(STEPS):
        target = (low + high) / 2
        try:
            found = counted_sparsities(network, plan, allocation, target)
        except Unreachable:
            high = target
            continue
        if cost(found) <= most:
            best, high = found, target
        else:
            low = target
    return best


def save_allocation(
    path: Path, plan: Plan, sparsities: Mapping[str, float], facts: Mapping[str, Any]
) -> None:
    """Write the allocation file that ``sparsity/allocation=file`` takes."""
    settled = with_zeros(plan, sparsities)
    full = {candidate.name: candidate.full for candidate in candidates(plan)}
    layers = {
        layer.name: StoredLayer(
            layer.shape, (layer.zeros or 0) / full[layer.name] * plan.pattern.limit
        )
        for layer in settled.pruned
    }
    write_allocation(path, layers, {"pattern": str(plan.pattern), **facts})

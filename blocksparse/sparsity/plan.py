"""The plan: which layer is pruned with which pattern to which sparsity, settled before training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from blocksparse.sparsity.allocation import (
    Allocation,
    Candidate,
    Uniform,
    Unreachable,
    weights_for,
)
from blocksparse.sparsity.layers import FoundLayer, Layers, find_layers
from blocksparse.sparsity.patterns import Block, Pattern, pattern_from_json, pattern_to_json
from blocksparse.sparsity.scores import Score, l2, score_named
from blocksparse.sparsity.selection import Floors, most_zeros

FROM_MODEL = "from_model"


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer.

    Parameters
    ----------
    name : str
        Its module name within the network.
    kind : str
        Its class, e.g. "Conv2d".
    shape : tuple of int
        Of its weight.
    pruned : bool
        Whether it is pruned at all.
    reason : str
        Why it stays dense, or what kept it from its share of the target; may be empty.
    start : int
        Zeros it begins with.
    zeros : int or None
        Zeros it ends with; None if that is decided among all layers (`Global`).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pruned: bool
    reason: str = ""
    start: int = 0
    zeros: int | None = 0

    @property
    def param(self) -> str:
        """The name of its weight in the network's state dict."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def size(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    @property
    def target(self) -> float | None:
        """The sparsity it ends with, 0..1; None if that is decided among all layers."""
        return None if self.zeros is None else self.zeros / self.size


@dataclass(frozen=True)
class Plan:
    """What happens to every layer of a network.

    Parameters
    ----------
    layers : tuple of LayerPlan
        Every convolution and linear layer, in order of definition.
    pattern : Pattern
        That the pruned layers are pruned with.
    score : Score
        What ranks their units.
    floors : Floors
        What they keep in any case.
    target : float
        The sparsity that was asked for.
    zeros : int
        Zeros that the pruned layers end with together.
    parameters : int
        Size of all parameters of the network, the dense ones included.
    """

    layers: tuple[LayerPlan, ...]
    pattern: Pattern
    score: Score
    floors: Floors
    target: float
    zeros: int
    parameters: int

    @property
    def pruned(self) -> tuple[LayerPlan, ...]:
        """The layers that are pruned."""
        return tuple(layer for layer in self.layers if layer.pruned)

    @property
    def prunable(self) -> int:
        """How many weights the pruned layers have."""
        return sum(layer.size for layer in self.pruned)

    @property
    def sparsity(self) -> float:
        """The sparsity of the prunable weights at the end, 0..1."""
        return self.zeros / max(self.prunable, 1)

    @property
    def sparsity_of_all(self) -> float:
        """The fraction of all parameters that is zero at the end, 0..1."""
        return self.zeros / max(self.parameters, 1)

    @property
    def shared_out(self) -> bool:
        """Whether every layer has a target of its own."""
        return all(layer.zeros is not None for layer in self.layers)

    def patterns(self) -> dict[str, Pattern]:
        """Return the pattern of each parameter that is pruned, by its name in the state dict."""
        return {layer.param: self.pattern for layer in self.pruned}

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the pruned parameters of ``network`` by name.

        Raises
        ------
        ValueError
            If ``network`` is not the network of this plan; names the layer and both shapes.
        """
        params = dict(network.named_parameters(remove_duplicate=False))
        for layer in self.pruned:
            shape = tuple(params[layer.param].shape) if layer.param in params else None
            if shape != layer.shape:
                raise ValueError(
                    f"{layer.param}: the sparsity plan has shape {layer.shape}, the network "
                    f"{shape or 'has no such parameter'}. The plan was made for another network; "
                    "use a fresh callback, or the network that goes with the checkpoint"
                )
        return {layer.param: params[layer.param] for layer in self.pruned}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values, for a file or a checkpoint."""
        return {
            "pattern": pattern_to_json(self.pattern),
            "score": self.score.name,
            "floors": asdict(self.floors),
            "target": self.target,
            "zeros": self.zeros,
            "parameters": self.parameters,
            "prunable": self.prunable,
            "sparsity": self.sparsity,
            "sparsity_of_all": self.sparsity_of_all,
            "layers": [
                {**asdict(layer), "shape": list(layer.shape), "target": layer.target}
                for layer in self.layers
            ],
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Plan:
        """Return the plan that `to_json` wrote."""
        layers = []
        for row in entry["layers"]:
            values = {key: value for key, value in row.items() if key != "target"}
            layers.append(LayerPlan(**{**values, "shape": tuple(row["shape"])}))
        return cls(
            layers=tuple(layers),
            pattern=pattern_from_json(entry["pattern"]),
            score=score_named(entry["score"]),
            floors=Floors(**entry["floors"]),
            target=entry["target"],
            zeros=entry["zeros"],
            parameters=entry["parameters"],
        )


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
        Sparsity of the prunable weights at the end, 0..1. 0 leaves every layer dense.
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
    candidates = [
        Candidate(
            layer.name,
            int(pattern.sizes(layer.shape).sum()),
            most_zeros(pattern, layer.shape, floors),
        )
        for layer in found
        if not layer.reason
    ]
    if not candidates and target > 0:
        listed = "; ".join(f"{layer.name}: {layer.reason}" for layer in found)
        raise ValueError(f"no layer is left to prune with {pattern}. The layers are: {listed}")
    try:
        goals = allocation.zeros(candidates, target, pattern.limit)
        starts = _starts(network, candidates, pattern, score, initial, target)
    except Unreachable as error:
        raise ValueError(f"{_remedy(target, pattern, floors)} Details: {error}.") from error
    by_name = {
        candidate.name: (candidate, goal, start)
        for candidate, goal, start in zip(candidates, goals, starts, strict=True)
    }
    rows = tuple(
        _row(layer, by_name, target, pattern.limit, initial == FROM_MODEL) for layer in found
    )
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
    limit: float,
    from_model: bool,
) -> LayerPlan:
    row = LayerPlan(layer.name, layer.kind, layer.shape, pruned=False, reason=layer.reason)
    if layer.reason:
        return row
    candidate, goal, start = by_name[layer.name]
    reason = ""
    if goal is not None:
        if goal == 0:
            return replace(row, reason="target 0")
        if goal == candidate.most and goal < weights_for(target / limit, candidate.full):
            reason = "held back by the floors"
        if start > goal and from_model:
            reason = "already has this much"
            goal = start
        start = min(start, goal)
    return replace(row, pruned=True, reason=reason, start=start, zeros=goal)


def _starts(
    network: nn.Module,
    candidates: list[Candidate],
    pattern: Pattern,
    score: Score,
    initial: float | str,
    target: float,
) -> list[int]:
    """Return the zeros each candidate begins with."""
    if isinstance(initial, str):
        if initial != FROM_MODEL:
            raise ValueError(f"sparsity.initial is a number or {FROM_MODEL!r}, not {initial!r}")
        starts = []
        for candidate in candidates:
            units = pattern.units(network.get_submodule(candidate.name).weight, score)  # type: ignore[arg-type]
            obeying = int(units.size[units.importance == 0].sum())
            starts.append(min(obeying, candidate.most))
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


def _remedy(target: float, pattern: Pattern, floors: Floors) -> str:
    """Say what cannot be had, and how to mend it."""
    return (
        f"sparsity target {target:g} cannot be reached with {pattern}, keep_channels="
        f"{floors.keep_channels} and min_density={floors.min_density:g}. Lower sparsity.target, "
        "take smaller blocks or one choice per kernel position "
        "(sparsity=block8x8_per_position), or loosen sparsity.keep_channels or "
        "sparsity.min_density."
    )

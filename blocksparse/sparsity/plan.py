"""The plan: which layer is pruned with which pattern to which sparsity, settled before training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from blocksparse.sparsity.patterns import Pattern, pattern_from_json, pattern_to_json
from blocksparse.sparsity.scores import Score, score_named
from blocksparse.sparsity.selection import Floors

TARGET_ZERO = "target 0"
"""Why a layer stays dense that could be pruned."""


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
        """How many weights the pruned layers have, and those whose own target is 0.

        Those might have been pruned too: leaving them dense must not make the rest look sparser.
        """
        counted = (layer for layer in self.layers if layer.pruned or layer.reason == TARGET_ZERO)
        return sum(layer.size for layer in counted)

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

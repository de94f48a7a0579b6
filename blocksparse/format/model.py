"""A network in memory: its graph, its weights, and what is known about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from blocksparse.format.graph import Graph
from blocksparse.format.weights import Floats, Weight


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes the network's input.

    Pixels are scaled to 0..1, resized bilinearly with antialiasing, cropped in the centre, then
    ``(x - mean) / std`` per channel.

    Parameters
    ----------
    resize : tuple of int, int or None
        (height, width) exactly, or the size the shorter side is given; None leaves the image.
    crop : tuple of int or None
        (height, width) of the centre crop.
    mean, std : tuple of float
        One entry per channel, of pixels in 0..1.
    channels : {"rgb", "gray"}
        Channel order the network was trained with.
    """

    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: Literal["rgb", "gray"]


@dataclass(frozen=True, eq=False)
class Model:
    """A network: everything a model file holds.

    Parameters
    ----------
    graph : Graph
    weights : mapping of str to Weight
        One per ``conv2d`` and ``linear`` node, by node name.
    vectors : mapping of str to ndarray of float32, 1-D
        ``<node>.bias`` where a weighted node has one; ``<node>.scale`` and ``<node>.shift`` of
        every ``affine`` node.
    classes : tuple of str, optional
        Class names, in the order of the logits.
    preprocessing : Preprocessing, optional
    provenance : dict, optional
        Where the model came from (config, metrics, library versions); anything JSON can say.
    """

    graph: Graph
    weights: Mapping[str, Weight]
    vectors: Mapping[str, Floats]
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the input, (C, H, W)."""
        return self.graph.inputs[0].shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output, batch axis excluded; (classes,) of a classifier."""
        return self.graph.shapes[self.graph.outputs[0]]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Model)
            and self.graph == other.graph
            and dict(self.weights) == dict(other.weights)
            and self.vectors.keys() == other.vectors.keys()
            and all(np.array_equal(v, other.vectors[name]) for name, v in self.vectors.items())
            and (self.classes, self.preprocessing) == (other.classes, other.preprocessing)
            and self.provenance == other.provenance
        )

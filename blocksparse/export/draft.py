"""A network between PyTorch and the file: the file's operations, with dense weights, still mutable.

Legend: K out-channels, C in-channels, kh kw kernel, O F features out and in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Shape = tuple[int, ...]


@dataclass
class DraftNode:
    """One operation, with the tensors that belong to it.

    Attributes
    ----------
    name, op, inputs, attrs, shape
        As in `blocksparse.format.Node`, shapes without the batch axis.
    weight : ndarray of float32 or None
        ``[K, C/groups, kh, kw]`` or ``[O, F]``. Shared with the captured model: never written to.
    bias : ndarray of float64 or None
        ``[K]``; rounded to float32 only when packed.
    scale, shift : ndarray of float64 or None
        ``[C]``, of an ``affine`` node.
    parameter : str or None
        Name of the model's parameter the weight came from.
    """

    name: str
    op: str
    inputs: list[str]
    attrs: dict[str, Any]
    shape: Shape
    weight: npt.NDArray[np.float32] | None = None
    bias: npt.NDArray[np.float64] | None = None
    scale: npt.NDArray[np.float64] | None = None
    shift: npt.NDArray[np.float64] | None = None
    parameter: str | None = None


@dataclass
class Draft:
    """A graph of `DraftNode` in execution order, one input and one output.

    Attributes
    ----------
    input_name : str
    input_shape : tuple of int
        ``(C, H, W)``.
    nodes : dict of str to DraftNode
        In execution order.
    output : str
        Name of the node whose value is the result.
    """

    input_name: str
    input_shape: Shape
    nodes: dict[str, DraftNode] = field(default_factory=dict)
    output: str = ""

    def __iter__(self) -> Iterator[DraftNode]:
        """Iterate over the nodes as they are now; the graph may change meanwhile."""
        return iter(list(self.nodes.values()))

    def shape(self, name: str) -> Shape:
        """Shape of a value, batch axis excluded."""
        return self.input_shape if name == self.input_name else self.nodes[name].shape

    def uses(self, name: str) -> int:
        """How often a value is read, the graph's output counted as one reading."""
        read = sum(node.inputs.count(name) for node in self.nodes.values())
        return read + (name == self.output)

    def sole_user(self, name: str) -> DraftNode | None:
        """Return the one node that reads a value; None where it is read more often or never."""
        if self.uses(name) != 1 or name == self.output:
            return None
        return next(node for node in self.nodes.values() if name in node.inputs)

    def bypass(self, node: DraftNode) -> None:
        """Remove a node; whoever read it reads its first input instead."""
        source = node.inputs[0]
        for other in self.nodes.values():
            other.inputs = [source if name == node.name else name for name in other.inputs]
        if self.output == node.name:
            self.output = source
        del self.nodes[node.name]

    def move(self, node: DraftNode, place: DraftNode) -> None:
        """Let `node` run where `place` ran, and give it `place`'s readers; `place` is removed."""
        for other in self.nodes.values():
            other.inputs = [node.name if name == place.name else name for name in other.inputs]
        if self.output == place.name:
            self.output = node.name
        order = [entry for entry in self.nodes.values() if entry is not node]
        self.nodes = {
            entry.name: entry for entry in (node if old is place else old for old in order)
        }

    def drop_unread(self) -> None:
        """Remove every node the output does not depend on."""
        wanted = {self.output}
        for node in reversed(list(self.nodes.values())):
            if node.name in wanted:
                wanted.update(node.inputs)
        self.nodes = {name: node for name, node in self.nodes.items() if name in wanted}

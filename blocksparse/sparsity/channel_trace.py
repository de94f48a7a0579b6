"""The trace: follows channels through a program, one operation after the other.

A traced value is followed as an array of ids with one axis for each of its own: of its full length
where channels run along the axis, 1 where all indices belong to the same channel. None stands for a
value without channels that could move, such as the image.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from blocksparse.sparsity.ledger import Ledger

Ids = np.ndarray | None
Value = Any  # Ids, a sequence of them (for operations with several results), or Stored
Arguments = Mapping[str, Any]

# More ids than this in one value: a product of axes that nobody permutes.
MOST_IDS = 4_000_000


@dataclass(frozen=True)
class Stored:
    """A parameter or buffer of the network."""

    name: str
    shape: tuple[int, ...]


class Trace:
    """Follows the channels through one traced program.

    Parameters
    ----------
    ledger : Ledger
        Where ids are dealt and tied.
    program : ExportedProgram
        Not decomposed.
    rules : mapping of str to callable
        By name of an operation: what it does with channels.
    """

    def __init__(self, ledger: Ledger, program: ExportedProgram, rules: Mapping[str, Rule]) -> None:
        self.rules = rules
        self.ledger = ledger
        self.program = program
        self.values: dict[Node, Value] = {}
        self.node: Node

    def run(self) -> None:
        """Go through the program, and fix what reaches its output."""
        signature = self.program.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        for node in self.program.graph.nodes:
            self.node = node
            if node.op == "placeholder":
                name = stored.get(node.name)
                self.values[node] = Stored(name, shape_of(node)) if name is not None else None
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                self.fix(node.all_input_nodes, "")

    def _call(self, node: Node) -> Value:
        if node.target is operator.getitem:
            source = self.values[node.all_input_nodes[0]]
            return source[node.args[1]] if isinstance(source, list | tuple) else source  # type: ignore[index]
        inputs = node.all_input_nodes
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return self.stop(inputs)
        if not any(self._moves(self.values[source]) for source in inputs):
            return None
        name = schema.name.removeprefix("aten::").removesuffix("_")
        bound = {
            argument.name: node.args[i]
            if i < len(node.args)
            else node.kwargs.get(argument.name, argument.default_value)
            for i, argument in enumerate(schema.arguments)
        }
        rule = self.rules.get(name)
        return self.stop(inputs) if rule is None else rule(self, bound)

    # -- reading arguments -----------------------------------------------------------------------

    @staticmethod
    def _moves(value: Value) -> bool:
        """Say whether there is anything to follow in a value."""
        if isinstance(value, list | tuple):
            return any(Trace._moves(one) for one in value)
        return value is not None

    def ids(self, node: Any) -> Ids:
        """Return the ids of an argument; those of a parameter if only one axis is longer than 1."""
        value = self.values.get(node) if isinstance(node, Node) else None
        if isinstance(value, list | tuple):
            self.fix([node])
            return None
        if not isinstance(value, Stored):
            return value
        long = [axis for axis, length in enumerate(value.shape) if length > 1]
        if len(long) != 1:
            self.fix([node])
            return None
        shape = [1] * len(value.shape)
        shape[long[0]] = -1
        return self.ledger.param(value.name, long[0], value.shape[long[0]]).reshape(shape)

    def along(self, ids: np.ndarray, node: Node, axis: int) -> np.ndarray | None:
        """Return the ids along ``axis``, None if they differ along another one as well."""
        axis %= ids.ndim
        others = ids.shape[:axis] + ids.shape[axis + 1 :]
        if math.prod(others) != 1:
            return None
        return np.broadcast_to(ids.reshape(-1), (shape_of(node)[axis],))

    def stored(self, node: Any) -> Stored | None:
        """Return the parameter or buffer that an argument is, None if it is none."""
        value = self.values.get(node) if isinstance(node, Node) else None
        return value if isinstance(value, Stored) else None

    def axis(self, stored: Stored, axis: int) -> np.ndarray:
        """Return the ids along an axis of a parameter or buffer."""
        return self.ledger.param(stored.name, axis, stored.shape[axis])

    # -- giving up -------------------------------------------------------------------------------

    def stop(self, nodes: Sequence[Node]) -> Any:
        """Leave everything in ``nodes`` where it is; the result then has nothing to follow."""
        self.fix(nodes)
        return None

    def fix(self, nodes: Sequence[Any], reason: str | None = None) -> None:
        """Fix the ids of ``nodes``, those of all axes where a parameter has several."""
        if reason is None:
            target = self.node.target
            reason = f"{getattr(target, '__name__', target)} reads them, which is not followed"
        for node in nodes:
            value = self.values.get(node) if isinstance(node, Node) else None
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, Stored):
                    for axis, length in enumerate(one.shape):
                        if length > 1:
                            self.ledger.fix(self.axis(one, axis))
                elif one is not None:
                    self.ledger.fix(one, reason)


def shape_of(node: Node) -> tuple[int, ...]:
    """Return the shape of a traced tensor, () for anything else."""
    value = node.meta.get("val")
    return tuple(int(length) for length in value.shape) if isinstance(value, Tensor) else ()


Rule = Callable[[Trace, Arguments], Value]

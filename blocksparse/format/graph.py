"""The network as a list of operations: what runs, in which order, on which values.

Shapes leave the batch axis out: ``(C, H, W)`` for feature maps, ``(F,)`` for vectors. Every value
is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blocksparse.format.errors import FormatError
from blocksparse.format.ops import OPS


@dataclass(frozen=True)
class ValueSpec:
    """Name and shape of a graph input.

    Parameters
    ----------
    name : str
        Unique among inputs and nodes.
    shape : tuple of int
        ``(C, H, W)``, batch axis excluded.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One operation with one output value, which carries the node's name.

    Parameters
    ----------
    name : str
        Module path where there is one (``"layer1.0.conv1"``), unique in the graph.
    op : str
        A key of :data:`blocksparse.format.ops.OPS`.
    inputs : tuple of str
        Names of graph inputs or of nodes that come earlier.
    attrs : mapping
        Exactly the attributes of the op; pairs and triples are tuples of int.
    shape : tuple of int
        Shape of the output value, batch axis excluded.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order, with what goes in and what comes out.

    Parameters
    ----------
    inputs : tuple of ValueSpec
        Exactly one in version 1.
    outputs : tuple of str
        Node names; exactly one in version 1.
    nodes : tuple of Node
        Every node comes after the nodes it reads.
    """

    inputs: tuple[ValueSpec, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every value by name, inputs first, batch axis excluded."""
        return {spec.name: spec.shape for spec in self.inputs} | {
            node.name: node.shape for node in self.nodes
        }

    def to_json(self) -> dict[str, Any]:
        """Return the graph as a dict that :func:`json.dumps` takes.

        Returns
        -------
        dict
            ``{"inputs": [{"name", "shape"}], "outputs": [...], "nodes": [{"name", "op", "inputs",
            "attrs", "shape"}]}``. What a node's weight looks like is not part of the graph; the
            writer adds it.
        """
        return {
            "inputs": [{"name": spec.name, "shape": list(spec.shape)} for spec in self.inputs],
            "outputs": list(self.outputs),
            "nodes": [
                {
                    "name": node.name,
                    "op": node.op,
                    "inputs": list(node.inputs),
                    "attrs": {
                        key: list(value) if isinstance(value, tuple) else value
                        for key, value in node.attrs.items()
                    },
                    "shape": list(node.shape),
                }
                for node in self.nodes
            ],
        }

    @classmethod
    def from_json(cls, tree: object) -> Graph:
        """Build the graph from what :meth:`to_json` gave.

        Parameters
        ----------
        tree : object
            Parsed JSON; trusted in nothing.

        Returns
        -------
        Graph
            Well formed: keys, types and attributes are right. Whether names, order and shapes agree
            is for :func:`blocksparse.format.validate.check_graph` to say.

        Raises
        ------
        FormatError
            On a missing or unknown key, a wrong type, an unknown op or a bad attribute.
        """
        top = record(tree, ("inputs", "outputs", "nodes"), "graph")
        inputs = []
        for entry in sequence(top["inputs"], "graph inputs"):
            fields = record(entry, ("name", "shape"), "graph input")
            name = text(fields["name"], "name of a graph input")
            inputs.append(ValueSpec(name, integers(fields["shape"], name, "shape")))
        outputs = [text(name, "graph output") for name in sequence(top["outputs"], "graph outputs")]
        nodes = [_node(entry) for entry in sequence(top["nodes"], "graph nodes")]
        return cls(tuple(inputs), tuple(outputs), tuple(nodes))


def _node(entry: object) -> Node:
    fields = record(entry, ("name", "op", "inputs", "attrs", "shape"), "graph node")
    name = text(fields["name"], "name of a graph node")
    op = text(fields["op"], f"op of {name}")
    if op not in OPS:
        raise FormatError(f"op {op!r} is unknown; version 1 has {', '.join(OPS)}", tensor=name)
    inputs = tuple(text(item, f"input of {name}") for item in sequence(fields["inputs"], "inputs"))
    attrs = record(fields["attrs"], tuple(OPS[op].attrs), "attrs", tensor=name)
    return Node(
        name=name,
        op=op,
        inputs=inputs,
        attrs={k: tuple(v) if isinstance(v, list) else v for k, v in attrs.items()},
        shape=integers(fields["shape"], name, "shape"),
    )


def record(
    tree: object, keys: tuple[str, ...], what: str, tensor: str | None = None
) -> dict[str, Any]:
    """Return `tree` if it is a JSON object with exactly `keys`, else raise FormatError."""
    if not isinstance(tree, dict):
        raise FormatError(f"{what} must be a JSON object, is {type(tree).__name__}", tensor=tensor)
    if set(tree) != set(keys):
        raise FormatError(
            f"{what} must have exactly the keys {sorted(keys)}, has {sorted(map(str, tree))}",
            tensor=tensor,
        )
    return tree


def sequence(tree: object, what: str) -> list[Any]:
    """Return `tree` if it is a JSON array, else raise FormatError."""
    if not isinstance(tree, list):
        raise FormatError(f"{what} must be a JSON array, is {type(tree).__name__}")
    return tree


def text(tree: object, what: str) -> str:
    """Return `tree` if it is a string, else raise FormatError."""
    if not isinstance(tree, str):
        raise FormatError(f"{what} must be a string, is {type(tree).__name__}")
    return tree


def integers(tree: object, tensor: str, what: str) -> tuple[int, ...]:
    """Return the JSON array `tree` as a tuple if it holds integers only, else raise FormatError."""
    if not isinstance(tree, list) or any(type(item) is not int for item in tree):
        raise FormatError(f"{what} must be a JSON array of integers", tensor=tensor)
    return tuple(tree)

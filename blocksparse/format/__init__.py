"""The model file: graph, tensors, reader, writer. ``docs/format.md`` is the contract."""

from __future__ import annotations

from blocksparse.format.errors import FormatError
from blocksparse.format.graph import Graph, Node, ValueSpec
from blocksparse.format.model import Model, Preprocessing
from blocksparse.format.ops import ACTIVATIONS, OPS
from blocksparse.format.reader import read, release
from blocksparse.format.validate import check_model
from blocksparse.format.weights import BsrWeight, DenseWeight, NMWeight, Weight
from blocksparse.format.writer import write

__all__ = [
    "ACTIVATIONS",
    "OPS",
    "BsrWeight",
    "DenseWeight",
    "FormatError",
    "Graph",
    "Model",
    "NMWeight",
    "Node",
    "Preprocessing",
    "ValueSpec",
    "Weight",
    "check_model",
    "read",
    "release",
    "write",
]

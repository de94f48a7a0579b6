"""What the lowering rules share: the values so far, names, and how to add an operation.

A *rule* turns one ATen operation into operations of the file. It gets the `Lowering`, the FX node,
and the arguments by their schema name, in which tensors are

- `Value`, something computed from the input, batch axis excluded everywhere, or
- `Constant`, a parameter, a buffer, or what was computed from those alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import fx

from blocksparse.export.draft import Draft, DraftNode, Shape
from blocksparse.export.errors import ExportError, UnsupportedOpError
from blocksparse.format import OPS

Arguments: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Value:
    """A tensor that depends on the input.

    Attributes
    ----------
    name : str
        The node of the draft that computes it.
    shape : tuple of int
        Its shape in PyTorch, batch axis excluded. Where it differs from the draft's, a reshape that
        moves no element is pending: `Lowering.feature` settles or refuses it.
    """

    name: str
    shape: Shape


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the input, and the parameter it came from, if one."""

    tensor: torch.Tensor
    name: str | None = None

    def numpy64(self) -> np.ndarray:
        """Return the tensor as float64."""
        return self.tensor.detach().numpy().astype(np.float64)


Rule: TypeAlias = Callable[["Lowering", fx.Node, Arguments], Any]


class Lowering:
    """The draft under construction.

    Parameters
    ----------
    draft : Draft
    leaves : set of str
        Paths of the modules without children: their operations carry the module's path as name.
    """

    def __init__(self, draft: Draft, leaves: set[str]) -> None:
        self.draft = draft
        self.leaves = leaves

    def emit(
        self,
        node: fx.Node,
        op: str,
        inputs: list[str],
        attrs: dict[str, Any] | None = None,
        **tensors: Any,
    ) -> Value:
        """Add one operation of the file.

        Parameters
        ----------
        node : fx.Node
            Where it comes from; gives the name, and is named in errors.
        op : str
            A key of `blocksparse.format.OPS`.
        inputs : list of str
            Names of draft values.
        attrs : dict, optional
        **tensors
            ``weight``, ``bias``, ``scale``, ``shift``, ``parameter`` of `DraftNode`.

        Returns
        -------
        Value
        """
        attrs = attrs or {}
        weight = tensors.get("weight")
        try:
            shape = OPS[op].infer_shape(
                attrs,
                [self.draft.shape(name) for name in inputs],
                None if weight is None else tuple(weight.shape),
            )
        except ValueError as error:
            raise self.unsupported(node, str(error)) from error
        name = self._name(node, op)
        self.draft.nodes[name] = DraftNode(name, op, inputs, attrs, tuple(shape), **tensors)
        return Value(name, tuple(shape))

    def feature(self, node: fx.Node, value: Any, rank: int | None = None) -> str:
        """Name of the draft value that has exactly the shape PyTorch gives `value`.

        Parameters
        ----------
        node : fx.Node
            The operation that reads it.
        value : Value
        rank : int, optional
            3 where only ``(C, H, W)`` will do, 1 where only ``(F,)`` will.

        Raises
        ------
        UnsupportedOpError
            A constant stands where an activation should, or the shape needs a reshape that the file
            has no operation for.
        """
        if not isinstance(value, Value):
            raise self.unsupported(node, "it takes a constant where the file needs an activation")
        if rank not in (None, len(value.shape)):
            wanted = "(batch, C, H, W)" if rank == 3 else "(batch, F)"
            raise self.unsupported(
                node, f"it works on shape (batch, {_commas(value.shape)}), not on {wanted}"
            )
        actual = self.draft.shape(value.name)
        if actual == value.shape:
            return value.name
        if len(value.shape) == 1 and len(actual) == 3 and prod(actual) == value.shape[0]:
            return self.emit(node, "flatten", [value.name]).name
        raise self.unsupported(
            node,
            f"it works on shape (batch, {_commas(value.shape)}), reshaped from "
            f"(batch, {_commas(actual)}), and the file has no operation for that reshape",
        )

    def unsupported(
        self, node: fx.Node, reason: str, hint: str | None = None
    ) -> UnsupportedOpError:
        """Return an error that names the operation, the module and the line of the model."""
        path = module_path(node)
        if hint is None:
            hint = (
                "Replace it by an operation the file has (convolution, linear, pooling, batch "
                "norm, relu, relu6, sigmoid, hardsigmoid, silu, hardswish, add, mul, cat, slice, "
                "pad), or leave it out of the model that is exported"
            )
        return UnsupportedOpError(str(node.target), path, reason, hint, _source(node))

    def check_shape(self, node: fx.Node, value: Value, shape: Shape) -> None:
        """Raise ExportError unless a rule gave the shape PyTorch gives."""
        if value.shape != shape:
            raise ExportError(
                f"{value.name}: {node.target} gives (batch, {_commas(shape)}) in PyTorch, but "
                f"was lowered to (batch, {_commas(value.shape)}); this is a defect of the export"
            )

    def _name(self, node: fx.Node, op: str) -> str:
        path = module_path(node)
        base = path if path in self.leaves and op != "flatten" else f"{path}.{op}".lstrip(".")
        name, count = base, 0
        while name in self.draft.nodes or name == self.draft.input_name:
            count += 1
            name = f"{base}_{count}"
        return name


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that called the operation; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if isinstance(entry, tuple)]
    return paths[-1] if paths else ""


def _source(node: fx.Node) -> str:
    """File and line in the model's code, as ``resnet.py:93``; empty where unknown."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    if not lines:
        return ""
    file, line = lines[-1]
    name = re.split(r"[/\\]", file)[-1]
    return f"{name}:{line}"


def _commas(shape: Shape) -> str:
    return ", ".join(map(str, shape))

"""Lowering rules of convolutions, linear layers and batch norm.

Legend: K out-channels, C in-channels, O F features out and in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from blocksparse.export.lowering import Arguments, Constant, Lowering, Rule, Value


def convolution(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """2-D convolution with constant weights; transposed ones are refused."""
    if args["transposed"]:
        raise lowering.unsupported(node, "it is a transposed convolution")
    weight = _constant(lowering, node, args["weight"], "weight")
    if weight.tensor.dim() != 4:
        raise lowering.unsupported(
            node, f"its weight has shape {tuple(weight.tensor.shape)}; only 2-D convolutions are"
        )
    attrs = {
        "stride": pair(args["stride"]),
        "padding": pair(args["padding"]),
        "dilation": pair(args["dilation"]),
        "groups": int(args["groups"]),
        "activation": "none",
    }
    source = lowering.feature(node, args["input"], rank=3)
    tensors = _weights(lowering, node, weight, args["bias"])
    return lowering.emit(node, "conv2d", [source], attrs, **tensors)


def addmm(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """``bias + input @ weight``, weight [F, O]: what a linear layer becomes."""
    if args["alpha"] != 1 or args["beta"] != 1:
        raise lowering.unsupported(node, "alpha and beta must be 1")
    weight = _constant(lowering, node, args["mat2"], "second factor")
    transposed = Constant(weight.tensor.t(), weight.name)
    return _linear(lowering, node, args["mat1"], transposed, args["self"])


def mm(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """``input @ weight``, weight [F, O]: a linear layer without bias."""
    weight = _constant(lowering, node, args["mat2"], "second factor")
    return _linear(lowering, node, args["self"], Constant(weight.tensor.t(), weight.name), None)


def linear(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Lower a linear layer that was not decomposed, weight [O, F]."""
    weight = _constant(lowering, node, args["weight"], "weight")
    return _linear(lowering, node, args["input"], weight, args["bias"])


def batch_norm(lowering: Lowering, node: fx.Node, args: Arguments) -> tuple[Value, None, None]:
    """Inference-mode batch norm as ``x * scale + shift`` in float64."""
    mean = _constant(lowering, node, args["running_mean"], "running mean").numpy64()
    var = _constant(lowering, node, args["running_var"], "running variance").numpy64()
    scale = 1.0 / np.sqrt(var + args["eps"])
    if args["weight"] is not None:
        scale = scale * _constant(lowering, node, args["weight"], "weight").numpy64()
    shift = -mean * scale
    if args["bias"] is not None:
        shift = shift + _constant(lowering, node, args["bias"], "bias").numpy64()
    source = lowering.feature(node, args["input"])
    value = lowering.emit(
        node, "affine", [source], {"activation": "none"}, scale=scale, shift=shift
    )
    return value, None, None


def pair(value: Any) -> tuple[int, int]:
    """Return ``(h, w)`` of an ATen size list, which may hold one number for both."""
    numbers = [int(number) for number in value]
    return (numbers[0], numbers[-1])


def _linear(lowering: Lowering, node: fx.Node, x: Any, weight: Constant, bias: Any) -> Value:
    source = lowering.feature(node, x, rank=1)
    tensors = _weights(lowering, node, weight, bias)
    return lowering.emit(node, "linear", [source], {"activation": "none"}, **tensors)


def _weights(lowering: Lowering, node: fx.Node, weight: Constant, bias: Any) -> dict[str, Any]:
    tensors: dict[str, Any] = {
        "weight": weight.tensor.detach().contiguous().numpy(),
        "parameter": weight.name,
    }
    if bias is not None:
        values = _constant(lowering, node, bias, "bias").numpy64()
        # addmm's first operand may be broadcast: [O], [1, O] or one number.
        tensors["bias"] = np.broadcast_to(values.reshape(-1), (weight.tensor.shape[0],))
    return tensors


def _constant(lowering: Lowering, node: fx.Node, argument: Any, role: str) -> Constant:
    if not isinstance(argument, Constant):
        raise lowering.unsupported(node, f"its {role} is computed from the input")
    return argument


RULES: dict[str, Rule] = {
    "aten.convolution": convolution,
    "aten.addmm": addmm,
    "aten.mm": mm,
    "aten.linear": linear,
    "aten._native_batch_norm_legit_no_training": batch_norm,
}

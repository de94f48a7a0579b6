"""Layers, pools and entry-by-entry operations: which channels they tie, and which they make."""

# N images, C K input and output channels, H W height and width

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from blocksparse.sparsity.channel_trace import (
    MOST_IDS,
    Arguments,
    Ids,
    Rule,
    Stored,
    Trace,
    Value,
    shape_of,
)


def _convolution(trace: Trace, bound: Arguments) -> Ids:
    weight = trace.stored(bound["weight"])
    if weight is None or len(shape_of(bound["input"])) != len(weight.shape):
        return trace.stop(trace.node.all_input_nodes)
    outs, cols = weight.shape[:2]
    groups = bound["groups"]
    ids = trace.ids(bound["input"])
    inner = None if ids is None else trace.along(ids, bound["input"], 1)
    if ids is not None and inner is None:
        return trace.stop(trace.node.all_input_nodes)
    if groups > 1 and cols == 1 and inner is not None:  # depthwise
        each = outs // groups
        source = inner.repeat(each)
        number = np.arange(outs) % each
        made = trace.ledger.joint(trace.node, trace.ledger.origins(source), number)
        out = trace.ledger.new(made)
        trace.ledger.tie(out, source)
    else:
        columns = trace.axis(weight, 1)
        if inner is None:
            trace.ledger.fix(columns)
        elif groups > 1:
            trace.ledger.fix(inner, f"a convolution of {groups} groups reads them")
            trace.ledger.fix(columns)
        else:
            _read(trace, columns, inner, "columns")
        made = trace.ledger.joint(trace.node, np.arange(outs) // (outs // groups))
        out = trace.ledger.new(made)
    return _rows(trace, out, weight, bound["bias"], len(shape_of(trace.node)), 1)


def _linear(trace: Trace, bound: Arguments) -> Ids:
    weight = trace.stored(bound["weight"])
    ids = trace.ids(bound["input"])
    inner = None if ids is None else trace.along(ids, bound["input"], -1)
    if weight is None or len(weight.shape) != 2 or (ids is not None and inner is None):
        return trace.stop(trace.node.all_input_nodes)
    columns = trace.axis(weight, 1)
    if inner is None:
        trace.ledger.fix(columns)
    else:
        _read(trace, columns, inner, "columns")
    out = trace.ledger.new(np.full(weight.shape[0], trace.ledger.label(trace.node)))
    return _rows(trace, out, weight, bound["bias"], len(shape_of(trace.node)), -1)


def _read(trace: Trace, columns: np.ndarray, source: np.ndarray, role: str) -> None:
    """Tie places of a parameter to the channels that they meet."""
    trace.ledger.tie(columns, source)
    trace.ledger.use(columns, (trace.node, role), trace.ledger.origins(source))


def _rows(trace: Trace, out: np.ndarray, weight: Stored, bias: Any, dims: int, axis: int) -> Ids:
    """Tie the rows of a weight and its bias to the channels they make."""
    _read(trace, trace.axis(weight, 0), out, "rows")
    if bias is not None:
        _affine(trace, out, [bias])
    shape = [1] * dims
    shape[axis] = -1
    return out.reshape(shape)


def _affine(trace: Trace, channels: np.ndarray, params: Sequence[Any]) -> None:
    """Tie parameters of one entry for each channel to the channels."""
    for number, param in enumerate(params):
        stored = trace.stored(param)
        if stored is not None and stored.shape == channels.shape:
            _read(trace, trace.axis(stored, 0), channels, f"entries {number}")
        elif param is not None:  # computed from others
            trace.fix([param])
            trace.ledger.fix(channels, "a layer computes their parameters from others")


def _batch_norm(trace: Trace, bound: Arguments) -> Ids:
    params = [bound[name] for name in ("weight", "bias", "running_mean", "running_var")]
    ids = trace.ids(bound["input"])
    channels = None if ids is None else trace.along(ids, bound["input"], 1)
    if ids is None or channels is None:
        return trace.stop(trace.node.all_input_nodes)
    _affine(trace, channels, params)
    return ids


def _layer_norm(trace: Trace, bound: Arguments) -> Ids:
    ids = trace.ids(bound["input"])
    channels = None if ids is None else trace.along(ids, bound["input"], -1)
    if ids is None or channels is None or len(bound["normalized_shape"]) != 1:
        return trace.stop(trace.node.all_input_nodes)
    # Normalised together: only channels that are all in it can change places.
    made = trace.ledger.new(trace.ledger.joint(trace.node, trace.ledger.origins(channels)))
    trace.ledger.tie(made, channels)
    _affine(trace, made, [bound["weight"], bound["bias"]])
    return made.reshape((1,) * (ids.ndim - 1) + (-1,))


def _pointwise(trace: Trace, bound: Arguments) -> Ids:
    first = next(iter(bound.values()))
    if trace.node.all_input_nodes != [first]:
        return trace.stop(trace.node.all_input_nodes)
    return trace.ids(first)


def _together(trace: Trace, bound: Arguments) -> Ids:
    nodes = trace.node.all_input_nodes
    dims = len(shape_of(trace.node))
    found = [(node, trace.ids(node)) for node in nodes]
    ids = [one.reshape((1,) * (dims - one.ndim) + one.shape) for _, one in found if one is not None]
    if not ids:
        return None
    shape = np.broadcast_shapes(*(one.shape for one in ids))
    for node, one in found:
        own = (1,) * (dims - len(shape_of(node))) + shape_of(node)
        if one is None and any(a > 1 and b > 1 for a, b in zip(own, shape, strict=True)):
            return trace.stop(nodes)
    if math.prod(shape) > MOST_IDS:
        return trace.stop(nodes)
    if len(ids) == 1:
        return ids[0]
    full = [np.broadcast_to(one, shape) for one in ids]
    made = trace.ledger.joint(trace.node, *(trace.ledger.origins(one) for one in full))
    out = trace.ledger.new(made)
    for number, (one, node) in enumerate(
        zip(full, (node for node, ids in found if ids is not None), strict=True)
    ):
        trace.ledger.tie(out, one)
        if trace.stored(node) is not None:
            flat = one.reshape(-1)
            trace.ledger.use(flat, (trace.node, number), made.reshape(-1))
    return out


def _pool(trace: Trace, bound: Arguments) -> Value:
    node = next(iter(bound.values()))
    ids = trace.ids(node)
    if ids is None or trace.along(ids, node, 1 if ids.ndim > 3 else -3) is None:
        return trace.stop(trace.node.all_input_nodes)
    several = isinstance(trace.node.meta["val"], list | tuple)
    return (ids, None) if several else ids


def _reduction(trace: Trace, bound: Arguments) -> Ids:
    first = next(iter(bound.values()))
    ids = trace.ids(first)
    if ids is None:
        return None
    dims = bound.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(ids.ndim))
    dims = [dim % ids.ndim for dim in dims]
    if any(ids.shape[dim] > 1 for dim in dims):
        return trace.stop(trace.node.all_input_nodes)
    return ids if bound.get("keepdim") else ids.squeeze(tuple(dims))


# One channel's result depends on that channel alone, whatever the other arguments are.
_POINTWISE = """
    relu relu6 hardtanh silu hardswish hardsigmoid sigmoid gelu tanh elu selu celu leaky_relu
    softplus mish clamp clamp_min clamp_max dropout alpha_dropout feature_dropout clone contiguous
    alias detach to _to_copy neg exp log abs sqrt rsqrt square lift_fresh_copy
"""
_POOLS = """
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d
"""

LAYERS: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE.split(), _pointwise),
    **dict.fromkeys(_POOLS.split(), _pool),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum"), _together),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduction),
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
}

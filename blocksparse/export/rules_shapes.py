"""Lowering rules of operations that move, cut or join elements.

Legend: C channels, H W image, g groups of a channel shuffle, d = C/g.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from torch import fx

from blocksparse.export.lowering import Arguments, Lowering, Rule, Value


def identity(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Copy or alias: nothing."""
    return args["self"]


def reshape(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Any reshape that keeps the batch axis: pending until an operation reads the result."""
    value = _value(lowering, node, args["self"])
    shape = tuple(node.meta["val"].shape[1:])
    # The batch is symbolic: it is still the first axis exactly if the others hold all the rest.
    if not all(isinstance(size, int) for size in shape) or prod(shape) != prod(value.shape):
        raise lowering.unsupported(node, "it mixes the batch with other axes")
    return Value(value.name, shape)


def permute(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Lower the channel shuffle ``(g, d, H, W) -> (d, g, H, W)`` to a sparse 1x1 convolution."""
    value = _value(lowering, node, args["self"])
    dims = [dim % (len(value.shape) + 1) for dim in args["dims"]]
    if dims == sorted(dims):
        return value
    actual = lowering.draft.shape(value.name)
    is_split = len(value.shape) == 4 and actual == (prod(value.shape[:2]), *value.shape[2:])
    if dims != [0, 2, 1, 3, 4] or not is_split:
        raise lowering.unsupported(
            node, f"the file has no operation that reorders dimensions as {tuple(dims)}"
        )
    groups, depth = value.shape[:2]
    source = np.arange(groups * depth).reshape(groups, depth).T.reshape(-1)
    weight = np.eye(groups * depth, dtype=np.float32)[source][:, :, None, None]
    attrs = {
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "groups": 1,
        "activation": "none",
    }
    shuffled = lowering.emit(node, "conv2d", [value.name], attrs, weight=weight)
    return Value(shuffled.name, (depth, groups, *value.shape[2:]))


def transpose(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Two dimensions swapped: a permutation."""
    rank = len(_value(lowering, node, args["self"]).shape) + 1
    dims = list(range(rank))
    first, second = args["dim0"] % rank, args["dim1"] % rank
    dims[first], dims[second] = second, first
    return permute(lowering, node, {"self": args["self"], "dims": dims})


def slice_(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Take a range along one axis; the whole of the batch axis is nothing."""
    value = _value(lowering, node, args["self"])
    axis = args["dim"] % (len(value.shape) + 1)
    if axis == 0:
        whole = args["start"] in (None, 0) and args["step"] == 1
        if not whole or (args["end"] is not None and args["end"] < 2**31):
            raise lowering.unsupported(node, "it takes a part of the batch")
        return value
    size = value.shape[axis - 1]
    start, stop, step = slice(args["start"], args["end"], args["step"]).indices(size)
    return _cut(lowering, node, value, axis, start, stop, step)


def select(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """One index of an axis: a slice of one, whose axis PyTorch then drops."""
    value = _value(lowering, node, args["self"])
    axis = args["dim"] % (len(value.shape) + 1)
    if axis == 0:
        raise lowering.unsupported(node, "it takes a part of the batch")
    index = args["index"] % value.shape[axis - 1]
    part = _cut(lowering, node, value, axis, index, index + 1, 1)
    return Value(part.name, part.shape[: axis - 1] + part.shape[axis:])


def split(lowering: Lowering, node: fx.Node, args: Arguments) -> list[Value]:
    """Consecutive parts along one axis, one slice each."""
    value = _value(lowering, node, args["self"])
    axis = args["dim"] % (len(value.shape) + 1)
    if axis == 0:
        raise lowering.unsupported(node, "it takes a part of the batch")
    ends = np.cumsum([int(size) for size in args["split_sizes"]]).tolist()
    starts = [0, *ends[:-1]]
    return [
        _cut(lowering, node, value, axis, start, end, 1)
        for start, end in zip(starts, ends, strict=True)
    ]


def cat(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Concatenation along channels, or features."""
    tensors = args["tensors"]
    names = [lowering.feature(node, value) for value in tensors]
    rank = len(tensors[0].shape) + 1
    if args["dim"] % rank != 1:
        raise lowering.unsupported(
            node, f"only concatenation along channels is, not along dimension {args['dim']}"
        )
    return tensors[0] if len(names) == 1 else lowering.emit(node, "concat", names)


def constant_pad(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Zeros around an image, or new channels of zeros."""
    if args["value"] != 0:
        raise lowering.unsupported(node, f"it pads with {args['value']}; only zeros are")
    source = lowering.feature(node, args["self"], rank=3)
    amounts = [int(amount) for amount in args["pad"]]
    if len(amounts) > 6 or min(amounts) < 0:
        raise lowering.unsupported(node, f"padding {amounts} crops, or pads the batch")
    amounts += [0] * (6 - len(amounts))
    # ATen lists the last axis first, (before, after) each.
    attrs = {"before": tuple(amounts[4::-2]), "after": tuple(amounts[5::-2])}
    return lowering.emit(node, "pad", [source], attrs)


def _cut(
    lowering: Lowering, node: fx.Node, value: Value, axis: int, start: int, stop: int, step: int
) -> Value:
    if (start, stop, step) == (0, value.shape[axis - 1], 1):
        return value
    source = lowering.feature(node, value, rank=3)
    starts, stops, steps = [0, 0, 0], list(value.shape), [1, 1, 1]
    starts[axis - 1], stops[axis - 1], steps[axis - 1] = start, stop, step
    attrs = {"start": tuple(starts), "stop": tuple(stops), "step": tuple(steps)}
    return lowering.emit(node, "slice", [source], attrs)


def _value(lowering: Lowering, node: fx.Node, argument: Any) -> Value:
    if not isinstance(argument, Value):
        raise lowering.unsupported(node, "it takes a constant where the file needs an activation")
    return argument


RULES: dict[str, Rule] = {
    "aten.clone": identity,
    "aten.alias": identity,
    "aten.detach": identity,
    "aten._to_copy": identity,
    "aten.view": reshape,
    "aten.reshape": reshape,
    "aten._unsafe_view": reshape,
    "aten.unsqueeze": reshape,
    "aten.squeeze": reshape,
    "aten.permute": permute,
    "aten.transpose": transpose,
    "aten.slice": slice_,
    "aten.select": select,
    "aten.split_with_sizes": split,
    "aten.cat": cat,
    "aten.constant_pad_nd": constant_pad,
}

"""Lowering rules of pooling and of the mean over an image."""

from __future__ import annotations

from torch import fx

from blocksparse.export.lowering import Arguments, Lowering, Rule, Value
from blocksparse.export.rules_products import pair


def max_pool2d(lowering: Lowering, node: fx.Node, args: Arguments) -> tuple[Value, None]:
    """Max pooling; its second result, the indices, has no counterpart."""
    kernel = pair(args["kernel_size"])
    attrs = {
        "kernel": kernel,
        "stride": pair(args["stride"] or kernel),
        "padding": pair(args["padding"]),
        "dilation": pair(args["dilation"]),
        "ceil_mode": bool(args["ceil_mode"]),
    }
    source = lowering.feature(node, args["self"], rank=3)
    return lowering.emit(node, "max_pool2d", [source], attrs), None


def avg_pool2d(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Average pooling by PyTorch's counting rules."""
    if args["divisor_override"] is not None:
        raise lowering.unsupported(node, "divisor_override has no counterpart")
    kernel = pair(args["kernel_size"])
    attrs = {
        "kernel": kernel,
        "stride": pair(args["stride"] or kernel),
        "padding": pair(args["padding"]),
        "ceil_mode": bool(args["ceil_mode"]),
        "count_include_pad": bool(args["count_include_pad"]),
    }
    source = lowering.feature(node, args["self"], rank=3)
    return lowering.emit(node, "avg_pool2d", [source], attrs)


def adaptive_avg_pool2d(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Average pooling to a given size."""
    source = lowering.feature(node, args["self"], rank=3)
    attrs = {"output_size": pair(args["output_size"])}
    return lowering.emit(node, "adaptive_avg_pool2d", [source], attrs)


def mean(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Mean over height and width, kept as ``(C, 1, 1)`` or not."""
    source = lowering.feature(node, args["self"], rank=3)
    if sorted(dim % 4 for dim in args["dim"] or ()) != [2, 3]:
        raise lowering.unsupported(
            node, f"only the mean over height and width is, not over dimensions {args['dim']}"
        )
    value = lowering.emit(node, "adaptive_avg_pool2d", [source], {"output_size": (1, 1)})
    return value if args["keepdim"] else Value(value.name, value.shape[:1])


RULES: dict[str, Rule] = {
    "aten.max_pool2d_with_indices": max_pool2d,
    "aten.avg_pool2d": avg_pool2d,
    "aten._adaptive_avg_pool2d": adaptive_avg_pool2d,
    "aten.adaptive_avg_pool2d": adaptive_avg_pool2d,
    "aten.mean": mean,
}

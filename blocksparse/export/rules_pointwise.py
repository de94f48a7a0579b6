"""Lowering rules of activations and arithmetic.

Legend: C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx

from blocksparse.export.lowering import Arguments, Constant, Lowering, Rule, Value


def _activation(name: str) -> Rule:
    def rule(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
        return _activate(lowering, node, args["self"], name)

    return rule


def clamp(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Clamping to [0, 6] is relu6, from 0 upwards is relu."""
    low = args.get("min_val", args.get("min"))
    high = args.get("max_val", args.get("max"))
    if low == 0 and high in (None, 6):
        return _activate(lowering, node, args["self"], "relu" if high is None else "relu6")
    raise lowering.unsupported(
        node, f"it clamps to [{low}, {high}]; only [0, 6] (relu6) and [0, None] (relu) are known"
    )


def add(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Sum of two activations, or of one and a constant per channel."""
    return _sum(lowering, node, args["self"], args["other"], args["alpha"])


def sub(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Difference: the second operand is added with its sign changed."""
    return _sum(lowering, node, args["self"], args["other"], -args["alpha"])


def rsub(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Difference with the operands exchanged."""
    return _sum(lowering, node, args["other"], args["self"], -args["alpha"])


def mul(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Product of two activations (the second may be a gate per channel), or with a constant."""
    first, second = args["self"], args["other"]
    if isinstance(first, Value) and isinstance(second, Value):
        if second.shape != first.shape and first.shape[1:] == (1, 1):
            first, second = second, first
        names = [lowering.feature(node, first), lowering.feature(node, second)]
        return lowering.emit(node, "mul", names)
    value, constant = (first, second) if isinstance(first, Value) else (second, first)
    return _affine(lowering, node, value, scale=constant)


def div(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Quotient by a constant, not rounded to a whole number."""
    if args.get("rounding_mode") is not None:
        raise lowering.unsupported(
            node, f"it rounds the quotient: rounding_mode={args['rounding_mode']!r}"
        )
    divisor = args["other"]
    if isinstance(divisor, Value):
        raise lowering.unsupported(node, "it divides by a computed value")
    numbers = divisor.numpy64() if isinstance(divisor, Constant) else np.float64(divisor)
    return _affine(lowering, node, args["self"], scale=1.0 / numbers)


def neg(lowering: Lowering, node: fx.Node, args: Arguments) -> Value:
    """Sign changed."""
    return _affine(lowering, node, args["self"], scale=-1.0)


def _activate(lowering: Lowering, node: fx.Node, value: Any, name: str) -> Value:
    source = lowering.feature(node, value)
    return lowering.emit(node, "activation", [source], {"activation": name})


def _sum(lowering: Lowering, node: fx.Node, first: Any, second: Any, alpha: float) -> Value:
    """``first + alpha * second``."""
    if isinstance(first, Value) and isinstance(second, Value):
        if alpha != 1:
            second = _affine(lowering, node, second, scale=alpha)
        names = [lowering.feature(node, first), lowering.feature(node, second)]
        return lowering.emit(node, "add", names, {"activation": "none"})
    if isinstance(first, Value):
        return _affine(lowering, node, first, shift=_numbers(second) * alpha)
    return _affine(lowering, node, second, scale=alpha, shift=first)


def _affine(
    lowering: Lowering, node: fx.Node, value: Any, scale: Any = 1.0, shift: Any = 0.0
) -> Value:
    source = lowering.feature(node, value)
    return lowering.emit(
        node,
        "affine",
        [source],
        {"activation": "none"},
        scale=_per_channel(lowering, node, scale, value.shape),
        shift=_per_channel(lowering, node, shift, value.shape),
    )


def _numbers(constant: Any) -> npt.NDArray[np.float64]:
    return constant.numpy64() if isinstance(constant, Constant) else np.asarray(constant, float)


def _per_channel(
    lowering: Lowering, node: fx.Node, constant: Any, shape: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    """Return a constant as ``[C]``, if it varies along channels only."""
    numbers = _numbers(constant)
    # Aligned at the right as PyTorch broadcasts, against (batch, C, 1, 1) or (batch, F).
    wanted = (1, shape[0]) + (1,) * (len(shape) - 1)
    try:
        full = np.broadcast_to(numbers, wanted)
    except ValueError:
        raise lowering.unsupported(
            node,
            f"its constant of shape {numbers.shape} varies along more than the channels of "
            f"(batch, {', '.join(map(str, shape))})",
        ) from None
    return full.reshape(-1)


RULES: dict[str, Rule] = {
    "aten.relu": _activation("relu"),
    "aten.sigmoid": _activation("sigmoid"),
    "aten.hardsigmoid": _activation("hardsigmoid"),
    "aten.silu": _activation("silu"),
    "aten.hardswish": _activation("hardswish"),
    "aten.hardtanh": clamp,
    "aten.clamp": clamp,
    "aten.clamp_min": clamp,
    "aten.add": add,
    "aten.sub": sub,
    "aten.rsub": rsub,
    "aten.mul": mul,
    "aten.div": div,
    "aten.neg": neg,
}

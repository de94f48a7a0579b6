"""Activations as vector code: at the end of a product, or in a pass of their own.

With SiLU at the end of its convolutions, in place of a pass behind each, EfficientNet-B0 at 75 %
takes 0.88 of the time on one thread (Zen 4, medians of processes in turns).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llvmlite import ir

from .writer import F32, I32, Writer

EXP_LOW, EXP_HIGH = -86.0, 89.0
"""Where `half_exp` stops: 1 plus what is below is 1, and what is above is infinite."""

# Cephes' expf, S. L. Moshier: exp(r) = 1 + r + r**2 * P(r) for |r| <= ln(2) / 2, highest power
# first, and ln(2) in two parts, of which the first has few bits
_POLYNOMIAL = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
    5.0000001201e-1,
)  # fmt: skip
_LN2 = (0.693359375, -2.12194440e-4)
_LOG2_E = 1.44269504088896341

# added to a number of fewer than 22 bits, it leaves the nearest integer in the lowest bits
_ROUND = 1.5 * 2**23


def ending(writer: Writer, kind: ir.Type) -> Callable[[ir.Value], ir.Value]:
    """Return what writes the end of a product: its activation, or the floats at ``bounds``.

    Clamps are read, so that they need no kernels of their own.

    Parameters
    ----------
    writer : Writer
        Of the kernel.
    kind : ir.Type
        Of the values: vectors, or single ones for bounds.
    """
    if writer.kernel.activation != "none":
        return partial(activated, writer)
    low, high = writer.bounds(kind)
    return lambda value: writer.between(value, low, high)


def activated(writer: Writer, value: ir.Value) -> ir.Value:
    """Apply the kernel's activation to a vector; NaN passes.

    Sigmoid and silu are off by at most 3 units in the last place, or 3e-37 where that is more: from
    -88.8 on down, silu is zero. As in PyTorch, silu and hardswish of minus infinity are NaN.
    """
    b, kind = writer.builder, writer.kernel.activation
    if kind == "relu":
        zero = _all(value, 0)
        return b.select(b.fcmp_ordered("<", value, zero), zero, value)
    if kind == "relu6":
        return writer.between(value, _all(value, 0), _all(value, 6))
    if kind in ("hardsigmoid", "hardswish"):
        above = b.fadd(value, _all(value, 3))
        gate = writer.between(above, _all(value, 0), _all(value, 6))
        gate = b.fdiv(gate, _all(value, 6))
        return gate if kind == "hardsigmoid" else b.fmul(value, gate)
    if kind in ("sigmoid", "silu"):
        one = _all(value, 1)
        # twice the half: the largest floats are more than the power of two that exp can make
        divisor = writer.fma(half_exp(writer, b.fneg(value)), _all(value, 2), one)
        return b.fdiv(one if kind == "sigmoid" else value, divisor)
    return value


def half_exp(writer: Writer, value: ir.Value) -> ir.Value:
    """Half of e to a power from `EXP_LOW` to `EXP_HIGH`; NaN passes.

    With r the distance to the nearest multiple n of ln(2), it is ``2**(n - 1) * exp(r)``.
    """
    b, fma = writer.builder, writer.fma
    value = writer.between(value, _all(value, EXP_LOW), _all(value, EXP_HIGH))
    shifted = fma(value, _all(value, _LOG2_E), _all(value, _ROUND))
    n = b.fsub(shifted, _all(value, _ROUND))
    r = value
    for part in _LN2:
        r = fma(n, _all(value, -part), r)
    # in pairs, which do not wait for each other
    square = b.fmul(r, r)
    coefficients = [_all(value, number) for number in _POLYNOMIAL]
    pairs = zip(coefficients[::2], coefficients[1::2], strict=True)
    total, *rest = (fma(high, r, low) for high, low in pairs)
    for pair in rest:
        total = fma(total, square, pair)
    total = b.fadd(fma(total, square, r), _all(value, 1))
    # n is in the lowest bits of what was rounded; it goes to where the exponent of 0.5 is
    lanes = value.type.count
    kind = ir.VectorType(I32, lanes)
    exponent = b.shl(b.bitcast(shifted, kind), ir.Constant(kind, [I32(23)] * lanes))
    half = b.bitcast(_all(value, 0.5), kind)
    return b.fmul(total, b.bitcast(b.add(exponent, half), value.type))


def _all(like: ir.Value, number: float) -> ir.Constant:
    """Return a vector of one number, as long as another."""
    return ir.Constant(like.type, [ir.Constant(F32, number)] * like.type.count)

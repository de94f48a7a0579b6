"""Operations on one pixel at a time: sums, products, gates, scales, and every activation.

Vectors run along a channel across its rows, as in a convolution, and what is padding becomes zero.
"""

from __future__ import annotations

from llvmlite import ir

from .writer import F32, FLOAT_BYTES, I32, I64, Writer

EXP_LOW, EXP_HIGH = -86.0, 89.0
"""Where `Pointwise.half_exp` stops: 1 plus what is below is 1, and what is above is infinite."""

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


class Pointwise(Writer):
    """One function of two operands at most, then an activation; the target may be the source.

    ``other`` is the second operand, pixel by pixel, or one gate a channel. Pixels outside the masks
    at ``inside`` become zero, those outside ``within`` are left alone. The first vector is number
    ``first`` of a run that starts at ``x``, at ``y`` and at the masks.
    """

    arguments = (
        "x", "x_channel", "y", "y_channel", "other", "other_channel", "scale", "shift", "inside",
        "within", "first", "channels", "count",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg = self.builder, self.arg
        function = self.kernel.op.split("_")[1]
        zero = ir.Constant(self.vector, None)
        starts = [b.mul(arg["first"], I64(n)) for n in (self.lanes * FLOAT_BYTES, self.bit_bytes)]

        def channel(state: list[ir.Value]) -> list[ir.Value]:
            x, y, other, scale_at, shift_at = state
            if function == "gate":
                gate = self.splat(self.load(F32, other), self.vector)
            elif function == "affine":
                scale, shift = (
                    self.splat(self.load(F32, at), self.vector) for at in (scale_at, shift_at)
                )

            def vector(state: list[ir.Value]) -> list[ir.Value]:
                at, bit = state
                value = self.load(self.vector, b.add(x, at))
                if function == "add":
                    value = b.fadd(value, self.load(self.vector, b.add(other, at)))
                elif function == "mul":
                    value = b.fmul(value, self.load(self.vector, b.add(other, at)))
                elif function == "gate":
                    value = b.fmul(value, gate)
                elif function == "affine":
                    value = self.fma(value, scale, shift)
                inside, within = (self.mask(b.add(arg[name], bit)) for name in ("inside", "within"))
                value = b.select(inside, self.activate(value), zero)
                self.store_first(value, b.add(y, at), within)
                return [self.step(at, self.lanes * FLOAT_BYTES), self.step(bit, self.bit_bytes)]

            self.loop(starts, vector)
            return [
                b.add(x, arg["x_channel"]),
                b.add(y, arg["y_channel"]),
                b.add(other, arg["other_channel"]),
                self.step(scale_at, FLOAT_BYTES),
                self.step(shift_at, FLOAT_BYTES),
            ]

        state = [arg[name] for name in ("x", "y", "other", "scale", "shift")]
        self.loop(state, channel, arg["channels"])
        b.ret_void()

    def activate(self, value: ir.Value) -> ir.Value:
        """Apply the kernel's activation; NaN passes.

        Sigmoid and silu are off by at most 3 units in the last place, or 3e-37 where that is more:
        from -88.8 on down, silu is zero. As in PyTorch, silu and hardswish of minus infinity are
        NaN.
        """
        b, kind = self.builder, self.kernel.activation
        if kind == "relu":
            return self._from_zero(value)
        if kind == "relu6":
            return self.between(value, self.constant(0), self.constant(6))
        if kind in ("hardsigmoid", "hardswish"):
            above = b.fadd(value, self.constant(3))
            gate = self.between(above, self.constant(0), self.constant(6))
            gate = b.fdiv(gate, self.constant(6))
            return gate if kind == "hardsigmoid" else b.fmul(value, gate)
        if kind in ("sigmoid", "silu"):
            one = self.constant(1)
            # twice the half: the largest floats are more than the power of two that exp can make
            divisor = self.fma(self.half_exp(b.fneg(value)), self.constant(2), one)
            return b.fdiv(one if kind == "sigmoid" else value, divisor)
        return value

    def half_exp(self, value: ir.Value) -> ir.Value:
        """Half of e to a power from `EXP_LOW` to `EXP_HIGH`; NaN passes.

        With r the distance to the nearest multiple n of ln(2), it is ``2**(n - 1) * exp(r)``.
        """
        b = self.builder
        value = self.between(value, self.constant(EXP_LOW), self.constant(EXP_HIGH))
        shifted = self.fma(value, self.constant(_LOG2_E), self.constant(_ROUND))
        n = b.fsub(shifted, self.constant(_ROUND))
        r = value
        for part in _LN2:
            r = self.fma(n, self.constant(-part), r)
        # in pairs, which do not wait for each other
        square = b.fmul(r, r)
        coefficients = [self.constant(value) for value in _POLYNOMIAL]
        pairs = zip(coefficients[::2], coefficients[1::2], strict=True)
        total, *rest = (self.fma(high, r, low) for high, low in pairs)
        for pair in rest:
            total = self.fma(total, square, pair)
        total = b.fadd(self.fma(total, square, r), self.constant(1))
        # n is in the lowest bits of what was rounded; it goes to where the exponent of 0.5 is
        kind = ir.VectorType(I32, self.lanes)
        exponent = b.shl(b.bitcast(shifted, kind), ir.Constant(kind, [I32(23)] * self.lanes))
        half = b.bitcast(self.constant(0.5), kind)
        return b.fmul(total, b.bitcast(b.add(exponent, half), self.vector))

    def _from_zero(self, value: ir.Value) -> ir.Value:
        zero = self.constant(0)
        return self.builder.select(self.builder.fcmp_ordered("<", value, zero), zero, value)

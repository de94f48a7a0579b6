"""Operations on one pixel at a time: sums, products, gates, scales, and every activation.

Vectors run along a channel across its rows, as in a convolution, and what is padding becomes zero.
"""

from __future__ import annotations

from llvmlite import ir

from .activations import activated
from .writer import F32, FLOAT_BYTES, I64, Writer


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
                value = b.select(inside, activated(self, value), zero)
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

"""Winograd's transforms: six rows of pixels to six planes on the way in, six planes to four rows.

One call covers one tile row of an image, all its columns, a vector at a time, and many channels.
The matrices are constants of the code: a zero costs nothing, any other entry one FMA at most.
"""

# T rows of a tile and planes (6), M output rows of a tile (4)

from __future__ import annotations

from llvmlite import ir

from .winograd_matrices import INPUT, OUTPUT
from .writer import F32, FLOAT_BYTES, I64, Writer


class Transform(Writer):
    """Sums weighted by the rows of a constant matrix."""

    def combine(self, row: list[float], values: list[ir.Value]) -> ir.Value:
        """Return the sum of the values, weighted by a row of a matrix."""
        total = None
        for weight, value in zip(row, values, strict=True):
            if weight == 0:
                continue
            if total is None:
                total = value if weight == 1 else self.builder.fmul(value, self._constant(weight))
            elif weight == 1:
                total = self.builder.fadd(total, value)
            elif weight == -1:
                total = self.builder.fsub(total, value)
            else:
                total = self.fma(self._constant(weight), value, total)
        return total

    def _constant(self, weight: float) -> ir.Constant:
        return ir.Constant(self.vector, [ir.Constant(F32, weight)] * self.lanes)


class WinogradInput(Transform):
    """Rows of all channels to the planes of one tile row.

    Rows outside the image are read from ``zeros``. Where ``first`` is not 0, a vector of zeros is
    written in front of every plane: the left padding of the band's first row.
    """

    arguments = (
        "x", "x_row", "x_channel", "top", "height", "zeros", "y", "y_plane", "y_channel", "first",
        "channels", "count",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg = self.builder, self.arg
        size = self.lanes * FLOAT_BYTES
        starts, strides = [], []
        for i in range(len(INPUT)):
            place = b.add(arg["top"], I64(i))
            # negative places are large as unsigned
            valid = b.icmp_unsigned("<", place, arg["height"])
            row = b.add(arg["x"], b.mul(place, arg["x_row"]))
            starts.append(b.select(valid, row, arg["zeros"]))
            strides.append(b.select(valid, arg["x_channel"], I64(0)))
        is_first = b.icmp_unsigned("!=", arg["first"], I64(0))
        zero = ir.Constant(self.vector, None)

        def channel(state: list[ir.Value]) -> list[ir.Value]:
            y, *rows = state
            with b.if_then(is_first):
                lead = b.sub(y, I64(size))
                for _ in INPUT:
                    self.store(zero, lead)
                    lead = b.add(lead, arg["y_plane"])

            def vector(state: list[ir.Value]) -> list[ir.Value]:
                (at,) = state
                pixels = [self.load(self.vector, b.add(row, at)) for row in rows]
                to = b.add(y, at)
                for weights in INPUT:
                    self.store(self.combine(weights, pixels), to)
                    to = b.add(to, arg["y_plane"])
                return [self.step(at, size)]

            self.loop([I64(0)], vector)
            following = [b.add(row, stride) for row, stride in zip(rows, strides, strict=True)]
            return [b.add(y, arg["y_channel"]), *following]

        self.loop([arg["y"], *starts], channel, arg["channels"])
        b.ret_void()


class WinogradOutput(Transform):
    """Planes of one tile row to rows of some output channels, through the epilogue."""

    arguments = (
        "x", "x_plane", "x_channel", "y", "y_row", "y_channel", "residual", "residual_row",
        "residual_channel", "bias", "inside", "within", "rows", "bounds", "channels", "count",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg = self.builder, self.arg
        has_residual = b.icmp_unsigned("!=", arg["residual"], I64(0))
        zero = ir.Constant(self.vector, None)

        def channel(state: list[ir.Value]) -> list[ir.Value]:
            x_start, y_start, residual, bias_at = state
            bias = self.splat(self.load(F32, bias_at), self.vector)

            def vector(state: list[ir.Value]) -> list[ir.Value]:
                at, bits = state
                x = b.add(x_start, at)
                planes = []
                for _ in INPUT:
                    planes.append(self.load(self.vector, x))
                    x = b.add(x, arg["x_plane"])
                inside, within = (
                    self.mask(b.add(arg[name], bits)) for name in ("inside", "within")
                )
                y, beside = b.add(y_start, at), b.add(residual, at)
                for i, row in enumerate(OUTPUT):
                    value = b.fadd(self.combine(row, planes), bias)
                    with b.if_then(b.icmp_signed(">", arg["rows"], I64(i))):
                        start = b.block
                        with b.if_then(has_residual):
                            # beyond the row lies another one, or padding: always memory of ours
                            added = b.fadd(value, self.load(self.vector, beside))
                            end = b.block
                        merged = b.phi(self.vector)
                        merged.add_incoming(value, start)
                        merged.add_incoming(added, end)
                        clamped = b.select(inside, self.clamp(merged), zero)
                        self.store_first(clamped, y, within)
                    y, beside = b.add(y, arg["y_row"]), b.add(beside, arg["residual_row"])
                return [self.step(at, self.lanes * FLOAT_BYTES), self.step(bits, self.bit_bytes)]

            self.loop([I64(0), I64(0)], vector)
            return [
                b.add(x_start, arg["x_channel"]),
                b.add(y_start, arg["y_channel"]),
                b.add(residual, arg["residual_channel"]),
                self.step(bias_at, FLOAT_BYTES),
            ]

        self.loop([arg["x"], arg["y"], arg["residual"], arg["bias"]], channel, arg["channels"])
        b.ret_void()

"""Winograd's transforms: six rows of pixels to six planes on the way in, six planes to four rows.

One call covers one channel and one tile row of an image: all its columns, a vector at a time. The
matrices are constants of the code: a zero costs nothing, and every other entry is one FMA at most.
"""

# T rows of a tile and planes (6), M output rows of a tile (4)

from __future__ import annotations

from llvmlite import ir

from .winograd_matrices import INPUT, OUTPUT
from .writer import F32, FLOAT_BYTES, I64, Writer


class _Transform(Writer):
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


class WinogradInput(_Transform):
    """Rows of one channel to the planes of one tile row."""

    arguments = ("r0", "r1", "r2", "r3", "r4", "r5", "y", "y_plane", "count")

    def write(self) -> None:
        """Write the function."""
        b, arg = self.builder, self.arg
        bytes_ = self.lanes * FLOAT_BYTES

        def vector(state: list[ir.Value]) -> list[ir.Value]:
            (at,) = state
            rows = [self.load(self.vector, b.add(arg[f"r{i}"], at)) for i in range(len(INPUT))]
            y = b.add(arg["y"], at)
            for row in INPUT:
                self.store(self.combine(row, rows), y)
                y = b.add(y, arg["y_plane"])
            return [self.step(at, bytes_)]

        self.loop([I64(0)], vector)
        b.ret_void()


class WinogradOutput(_Transform):
    """Planes of one tile row to rows of one output channel, through the epilogue."""

    arguments = (
        "x", "x_plane", "y", "y_row", "residual", "residual_row", "bias", "inside", "within",
        "rows", "bounds", "count",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg = self.builder, self.arg
        bias = self.splat(self.load(F32, arg["bias"]), self.vector)
        has_residual = b.icmp_unsigned("!=", arg["residual"], I64(0))
        zero = ir.Constant(self.vector, None)

        def vector(state: list[ir.Value]) -> list[ir.Value]:
            at, bits = state
            x = b.add(arg["x"], at)
            planes = []
            for _ in INPUT:
                planes.append(self.load(self.vector, x))
                x = b.add(x, arg["x_plane"])
            inside, within = (self.mask(b.add(arg[name], bits)) for name in ("inside", "within"))
            y, beside = b.add(arg["y"], at), b.add(arg["residual"], at)
            for i, row in enumerate(OUTPUT):
                value = b.fadd(self.combine(row, planes), bias)
                with b.if_then(b.icmp_signed(">", arg["rows"], I64(i))):
                    start = b.block
                    with b.if_then(has_residual):
                        # beyond the row lies another one, or its padding: always memory of ours
                        added = b.fadd(value, self.load(self.vector, beside))
                        end = b.block
                    merged = b.phi(self.vector)
                    merged.add_incoming(value, start)
                    merged.add_incoming(added, end)
                    self.store_masked(b.select(inside, self.clamp(merged), zero), y, within)
                y, beside = b.add(y, arg["y_row"]), b.add(beside, arg["residual_row"])
            return [
                self.step(at, self.lanes * FLOAT_BYTES),
                self.step(bits, self.bit_bytes),
            ]

        self.loop([I64(0), I64(0)], vector)
        b.ret_void()

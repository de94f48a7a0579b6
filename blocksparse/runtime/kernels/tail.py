"""The last pixels of a block-sparse convolution, where too few are left for a vector of them."""

# R rows (output channels) of a tile, J columns (input channels) of a step, P pixels

from __future__ import annotations

from llvmlite import ir

from .writer import F32, FLOAT_BYTES, I32, I64, Writer

CHAINS = 8
"""Sums that are added to in turn, so that a multiply-add need not wait for the one before."""


class SparseTail(Writer):
    """As `pixel.SparseConv` for P pixels, all inside the image; vectors run over output channels.

    The weights of a column lie side by side, so they are loaded at once and multiplied by one pixel
    after the other: P multiply-adds a column, of half a vector with AVX-512, in place of R.
    """

    arguments = (
        "x", "w", "offsets", "count", "x_stride", "y", "y_stride", "bias", "residual",
        "residual_stride", "rows", "bounds", "w_next",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function: R rows after the other."""
        b, arg, height = self.builder, self.arg, I64(self.kernel.rows)
        y_step = b.mul(arg["y_stride"], height)
        residual_step = b.mul(arg["residual_stride"], height)

        def rows(state: list[ir.Value]) -> list[ir.Value]:
            w, y, residual, bias, left = state
            self.finish(self.sums(w, bias), y, residual, left)
            return [
                b.add(w, arg["w_next"]),
                b.add(y, y_step),
                b.add(residual, residual_step),
                self.step(bias, self.kernel.rows * FLOAT_BYTES),
                b.sub(left, height),
            ]

        times = b.udiv(b.add(arg["rows"], I64(self.kernel.rows - 1)), height)
        start = [arg[name] for name in ("w", "y", "residual", "bias", "rows")]
        self.loop(start, rows, times)
        b.ret_void()

    def sums(self, w: ir.Value, bias: ir.Value) -> list[ir.Value]:
        """Vectors [P] of R output channels: the blocks of a block row, and the bias."""
        b, kernel, arg = self.builder, self.kernel, self.arg
        channels = ir.VectorType(F32, kernel.rows)
        chains = min(kernel.columns, max(1, CHAINS // kernel.width))

        def block(state: list[ir.Value]) -> list[ir.Value]:
            offsets, w, *sums = state
            at = b.add(arg["x"], b.shl(b.sext(self.load(I32, offsets), I64), I64(2)))
            for j in range(kernel.columns):
                weights = self.load(channels, self.step(w, j * kernel.rows * FLOAT_BYTES))
                for p in range(kernel.width):
                    pixel = self.splat(self.load(F32, self.step(at, p * FLOAT_BYTES)), channels)
                    i = j % chains * kernel.width + p
                    sums[i] = self.fma(weights, pixel, sums[i])
                at = b.add(at, arg["x_stride"])
            block_bytes = kernel.rows * kernel.columns * FLOAT_BYTES
            return [self.step(offsets, 4), self.step(w, block_bytes), *sums]

        first = [self.load(channels, bias)] * kernel.width
        others = [ir.Constant(channels, None)] * (kernel.width * (chains - 1))
        _, _, *sums = self.loop([arg["offsets"], w, *first, *others], block)
        for chain in range(1, chains):
            for p in range(kernel.width):
                sums[p] = b.fadd(sums[p], sums[chain * kernel.width + p])
        return sums[: kernel.width]

    def finish(self, sums: list[ir.Value], y: ir.Value, residual: ir.Value, left: ir.Value) -> None:
        """Add the residual if any, clamp, store the rows that exist."""
        b = self.builder
        done = self.function.append_basic_block("stored")
        has_residual = b.icmp_unsigned("!=", self.arg["residual"], I64(0))
        bounds = self.bounds(F32)
        for r in range(self.kernel.rows):
            row = self.function.append_basic_block(f"row{r}")
            b.cbranch(b.icmp_signed(">", left, I64(r)), row, done)
            b.position_at_end(row)
            plain = [b.extract_element(pixel, I32(r)) for pixel in sums]
            at = b.add(residual, b.mul(self.arg["residual_stride"], I64(r)))
            with b.if_then(has_residual):
                added = [
                    b.fadd(value, self.load(F32, self.step(at, p * FLOAT_BYTES)))
                    for p, value in enumerate(plain)
                ]
                inside = b.block
            merged = [b.phi(F32) for _ in plain]
            for phi, value, beside in zip(merged, plain, added, strict=True):
                phi.add_incoming(value, row)
                phi.add_incoming(beside, inside)
            at = b.add(y, b.mul(self.arg["y_stride"], I64(r)))
            for p, value in enumerate(merged):
                self.store(self.between(value, *bounds), self.step(at, p * FLOAT_BYTES))
        b.branch(done)
        b.position_at_end(done)

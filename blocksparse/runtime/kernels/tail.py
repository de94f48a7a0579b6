"""The last pixels of a block-sparse convolution, where too few are left for a vector of them."""

# R rows (output channels) of a tile, J columns (input channels) of a step, P pixels

from __future__ import annotations

from llvmlite import ir

from .activations import activated, ending
from .pixel import RowsWriter
from .writer import F32, FLOAT_BYTES, I32, I64

CHAINS = 8
"""Sums that are added to in turn, so that a multiply-add need not wait for the one before."""


class SparseTail(RowsWriter):
    """As `pixel.SparseConv` for P pixels, all inside the image; vectors run over output channels.

    The weights of a column lie side by side, so they are loaded at once and multiplied by one pixel
    after the other: P multiply-adds a column, of half a vector with AVX-512, in place of R. An
    activation comes before the residual, so a kernel that has one is not for both.
    """

    arguments = (
        "x", "w", "offsets", "count", "x_stride", "y", "y_stride", "bias", "residual",
        "residual_stride", "rows", "bounds", "w_next",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""

        def part(
            w: ir.Value, y: ir.Value, residual: ir.Value, bias: ir.Value, left: ir.Value
        ) -> None:
            sums = self.sums(w, bias)
            if self.kernel.activation == "none":
                end = ending(self, F32)
            else:  # of all channels at once
                sums, end = [activated(self, pixel) for pixel in sums], lambda value: value
            self.finish(
                F32, lambda r: [self.builder.extract_element(pixel, I32(r)) for pixel in sums],
                y, residual, left, end,
            )  # fmt: skip

        self.each_rows(self.arg["y"], self.arg["residual"], part)
        self.builder.ret_void()

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

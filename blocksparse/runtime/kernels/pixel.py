"""Products whose vectors run over pixels: block-sparse and packed N:M convolution."""

# R rows (output channels) of a tile, J columns (input channels) of a step, V vectors of pixels

from __future__ import annotations

from llvmlite import ir

from blocksparse.format.weights import index_bits

from .writer import F32, FLOAT_BYTES, I32, I64, LINE_BYTES, Writer


class PixelWriter(Writer):
    """Epilogue of the products whose vectors run over pixels."""

    def bias_tile(self) -> list[ir.Value]:
        """Accumulators [R * V], each row starting from its bias."""
        tile = []
        for r in range(self.kernel.rows):
            bias = self.splat(
                self.load(F32, self.step(self.arg["bias"], r * FLOAT_BYTES)), self.vector
            )
            tile += [bias] * self.kernel.width
        return tile

    def finish(self, tile: list[ir.Value]) -> None:
        """Add the residual if any, clamp, zero the padding pixels, store the rows that exist."""
        b, width = self.builder, self.kernel.width
        done = self.function.append_basic_block("stored")
        has_residual = b.icmp_unsigned("!=", self.arg["residual"], I64(0))
        masks = [self.mask(self.step(self.arg["mask"], v * self.bit_bytes)) for v in range(width)]
        zero = ir.Constant(self.vector, None)
        for r in range(self.kernel.rows):
            row = self.function.append_basic_block(f"row{r}")
            b.cbranch(b.icmp_signed(">", self.arg["rows"], I64(r)), row, done)
            b.position_at_end(row)
            plain = tile[r * width : (r + 1) * width]
            with b.if_then(has_residual):
                at = b.add(self.arg["residual"], b.mul(self.arg["residual_stride"], I64(r)))
                added = [
                    b.fadd(x, self.load(self.vector, self.step(at, v * self.lanes * FLOAT_BYTES)))
                    for v, x in enumerate(plain)
                ]
                inside = b.block
            merged = []
            for x, y in zip(plain, added, strict=True):
                phi = b.phi(self.vector)
                phi.add_incoming(x, row)
                phi.add_incoming(y, inside)
                merged.append(phi)
            at = b.add(self.arg["y"], b.mul(self.arg["y_stride"], I64(r)))
            for v, x in enumerate(merged):
                value = b.select(masks[v], self.clamp(x), zero)
                self.store(value, self.step(at, v * self.lanes * FLOAT_BYTES))
        b.branch(done)
        b.position_at_end(done)
        b.ret_void()


class SparseConv(PixelWriter):
    """Blocks of R output by J input channels against V vectors of pixels."""

    arguments: tuple[str, ...] = (
        "x", "w", "offsets", "count", "x_stride", "y", "y_stride", "bias", "residual",
        "residual_stride", "mask", "rows", "bounds",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, kernel, arg = self.builder, self.kernel, self.arg
        width = kernel.width
        block_bytes = kernel.rows * kernel.columns * FLOAT_BYTES

        def block(state: list[ir.Value]) -> list[ir.Value]:
            offsets, w, *tile = state
            offset = b.sext(self.load(I32, offsets), I64)
            x = b.add(arg["x"], b.shl(offset, I64(2)))
            self.prefetch_weights(w, block_bytes)
            following = b.sext(self.load(I32, self.step(offsets, 4)), I64)
            ahead = b.add(arg["x"], b.shl(following, I64(2)))
            for j in range(kernel.columns):
                for v in range(0, width * self.lanes * FLOAT_BYTES, LINE_BYTES):
                    self.prefetch(self.step(ahead, v))
                ahead = b.add(ahead, arg["x_stride"])
                inputs = [
                    self.load(self.vector, self.step(x, v * self.lanes * FLOAT_BYTES))
                    for v in range(width)
                ]
                for r in range(kernel.rows):
                    at = self.step(w, (j * kernel.rows + r) * FLOAT_BYTES)
                    weight = self.splat(self.load(F32, at), self.vector)
                    for v in range(width):
                        i = r * width + v
                        tile[i] = self.fma(weight, inputs[v], tile[i])
                x = b.add(x, arg["x_stride"])
            return [self.step(offsets, 4), self.step(w, block_bytes), *tile]

        _, _, *tile = self.loop([arg["offsets"], arg["w"], *self.bias_tile()], block)
        self.finish(tile)


class SparseProduct(SparseConv):
    """The same sums without an epilogue: what stands between Winograd's transforms."""

    arguments = ("x", "w", "offsets", "count", "x_stride", "y", "y_stride")

    def bias_tile(self) -> list[ir.Value]:
        """Accumulators [R * V], all zero."""
        zero = ir.Constant(self.vector, None)
        return [zero] * (self.kernel.rows * self.kernel.width)

    def finish(self, tile: list[ir.Value]) -> None:
        """Store all rows of the tile."""
        b, width = self.builder, self.kernel.width
        at = self.arg["y"]
        for r in range(self.kernel.rows):
            for v in range(width):
                self.store(tile[r * width + v], self.step(at, v * self.lanes * FLOAT_BYTES))
            at = b.add(at, self.arg["y_stride"])
        b.ret_void()


class NMConv(PixelWriter):
    """Groups of one output channel against V vectors of pixels."""

    arguments = (
        "x", "w", "indices", "offsets", "count", "x_stride", "y", "y_stride", "bias", "residual",
        "residual_stride", "mask", "rows", "bounds",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, kernel, arg = self.builder, self.kernel, self.arg
        bits = index_bits(kernel.group)

        def group(state: list[ir.Value]) -> list[ir.Value]:
            offsets, w, position, *tile = state
            offset = b.sext(self.load(I32, offsets), I64)
            base = b.add(arg["x"], b.shl(offset, I64(2)))
            for i in range(kernel.columns):
                index = self.nm_index(b.add(position, I64(i * bits)))
                x = b.add(base, b.mul(index, arg["x_stride"]))
                weight = self.splat(self.load(F32, self.step(w, i * FLOAT_BYTES)), self.vector)
                for v in range(kernel.width):
                    pixels = self.load(self.vector, self.step(x, v * self.lanes * FLOAT_BYTES))
                    tile[v] = self.fma(weight, pixels, tile[v])
            return [
                self.step(offsets, 4),
                self.step(w, kernel.columns * FLOAT_BYTES),
                b.add(position, I64(kernel.columns * bits)),
                *tile,
            ]

        start = [arg["offsets"], arg["w"], I64(0), *self.bias_tile()]
        _, _, _, *tile = self.loop(start, group)
        self.finish(tile)

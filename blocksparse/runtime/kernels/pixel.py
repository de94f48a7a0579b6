"""Products whose vectors run over pixels: block-sparse and packed N:M convolution."""

# R rows (output channels) of a tile, J columns (input channels) of a step, V vectors of pixels

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from blocksparse.format.weights import index_bits

from .activations import ending
from .writer import F32, FLOAT_BYTES, I32, I64, LINE_BYTES, Writer


class RowsWriter(Writer):
    """What follows the sums of R output channels: those of more channels, and the epilogue."""

    def each_rows(
        self,
        y: ir.Value,
        residual: ir.Value,
        part: Callable[[ir.Value, ir.Value, ir.Value, ir.Value, ir.Value], None],
    ) -> None:
        """Write ``part(w, y, residual, bias, left)`` for R rows after the other of those asked for.

        Their weights lie ``w_next`` bytes apart.
        """
        b, arg, height = self.builder, self.arg, I64(self.kernel.rows)
        y_step = b.mul(arg["y_stride"], height)
        residual_step = b.mul(arg["residual_stride"], height)

        def rows(state: list[ir.Value]) -> list[ir.Value]:
            w, y, residual, bias, left = state
            part(w, y, residual, bias, left)
            return [
                b.add(w, arg["w_next"]),
                b.add(y, y_step),
                b.add(residual, residual_step),
                self.step(bias, self.kernel.rows * FLOAT_BYTES),
                b.sub(left, height),
            ]

        times = b.udiv(b.add(arg["rows"], I64(self.kernel.rows - 1)), height)
        self.loop([arg["w"], y, residual, arg["bias"], arg["rows"]], rows, times)

    def finish(
        self,
        kind: ir.Type,
        sums: Callable[[int], list[ir.Value]],
        y: ir.Value,
        residual: ir.Value,
        rows: ir.Value,
        end: Callable[[ir.Value], ir.Value],
        masks: list[ir.Value] | None = None,
    ) -> None:
        """Add the residual if any, end, zero the padding pixels, store the rows that exist.

        ``sums(r)`` are the vectors or pixels of row r, of that kind and side by side.
        """
        b = self.builder
        done = self.function.append_basic_block("stored")
        has_residual = b.icmp_unsigned("!=", self.arg["residual"], I64(0))
        size = FLOAT_BYTES * getattr(kind, "count", 1)
        for r in range(self.kernel.rows):
            row = self.function.append_basic_block(f"row{r}")
            b.cbranch(b.icmp_signed(">", rows, I64(r)), row, done)
            b.position_at_end(row)
            plain = sums(r)
            with b.if_then(has_residual):
                at = b.add(residual, b.mul(self.arg["residual_stride"], I64(r)))
                added = [
                    b.fadd(x, self.load(kind, self.step(at, v * size))) for v, x in enumerate(plain)
                ]
                inside = b.block
            merged = []
            for x, beside in zip(plain, added, strict=True):
                phi = b.phi(kind)
                phi.add_incoming(x, row)
                phi.add_incoming(beside, inside)
                merged.append(phi)
            at = b.add(y, b.mul(self.arg["y_stride"], I64(r)))
            for v, x in enumerate(merged):
                value = end(x)
                if masks is not None:
                    value = b.select(masks[v], value, ir.Constant(kind, None))
                self.store(value, self.step(at, v * size))
        b.branch(done)
        b.position_at_end(done)


class PixelWriter(RowsWriter):
    """Register tiles of pixels, one beside the other, and their epilogue.

    One call computes ``tiles`` of them from the same weights. With a call for each, ResNet-50 took
    1.08 times as long at 90 % (one core of a Zen 3).
    """

    def write(self) -> None:
        """Write the function."""
        arg, kernel = self.arg, self.kernel
        pixels = kernel.width * self.lanes * FLOAT_BYTES

        def tile(state: list[ir.Value]) -> list[ir.Value]:
            x, y, residual, mask = state
            self.tile(x, y, residual, mask)
            following = [self.step(at, pixels) for at in (x, y, residual)]
            return [*following, self.step(mask, kernel.width * self.bit_bytes)]

        start = [arg[name] for name in ("x", "y", "residual", "mask")]
        self.loop(start, tile, arg["tiles"])
        self.builder.ret_void()

    def tile(self, x: ir.Value, y: ir.Value, residual: ir.Value, mask: ir.Value) -> None:
        """Write what computes one tile of pixels."""
        raise NotImplementedError

    def bias_tile(self, bias: ir.Value) -> list[ir.Value]:
        """Accumulators [R * V], each row starting from its bias."""
        tile = []
        for r in range(self.kernel.rows):
            one = self.splat(self.load(F32, self.step(bias, r * FLOAT_BYTES)), self.vector)
            tile += [one] * self.kernel.width
        return tile

    def finish_tile(
        self, tile: list[ir.Value], y: ir.Value, residual: ir.Value, mask: ir.Value, rows: ir.Value
    ) -> None:
        """Finish accumulators [R * V], with a mask for each vector of pixels."""
        width = self.kernel.width
        masks = [self.mask(self.step(mask, v * self.bit_bytes)) for v in range(width)]
        self.finish(
            self.vector, lambda r: tile[r * width : (r + 1) * width], y, residual, rows,
            ending(self, self.vector), masks,
        )  # fmt: skip


class BlockSums(Writer):
    """Sums of blocks of R output by J input channels against V vectors of pixels."""

    def ask_for_rows(self, at: ir.Value, stride: ir.Value, to_write: bool) -> None:
        """Ask for the pixels of a tile in R rows, so many bytes apart."""
        for _ in range(self.kernel.rows):
            for v in range(0, self.kernel.width * self.lanes * FLOAT_BYTES, LINE_BYTES):
                self.prefetch(self.step(at, v), to_write)
            at = self.builder.add(at, stride)

    def block_sums(self, x: ir.Value, w: ir.Value, tile: list[ir.Value]) -> list[ir.Value]:
        """Write the loop over the blocks of a block row, from accumulators [R * V] on."""
        b, kernel, arg = self.builder, self.kernel, self.arg
        width = kernel.width
        block_bytes = kernel.rows * kernel.columns * FLOAT_BYTES

        def block(state: list[ir.Value]) -> list[ir.Value]:
            offsets, w, *tile = state
            offset = b.sext(self.load(I32, offsets), I64)
            at = b.add(x, b.shl(offset, I64(2)))
            self.prefetch_weights(w, block_bytes)
            following = b.sext(self.load(I32, self.step(offsets, 4)), I64)
            ahead = b.add(x, b.shl(following, I64(2)))
            for j in range(kernel.columns):
                for v in range(0, width * self.lanes * FLOAT_BYTES, LINE_BYTES):
                    self.prefetch(self.step(ahead, v))
                ahead = b.add(ahead, arg["x_stride"])
                inputs = [
                    self.load(self.vector, self.step(at, v * self.lanes * FLOAT_BYTES))
                    for v in range(width)
                ]
                for r in range(kernel.rows):
                    place = self.step(w, (j * kernel.rows + r) * FLOAT_BYTES)
                    weight = self.splat(self.load(F32, place), self.vector)
                    for v in range(width):
                        i = r * width + v
                        tile[i] = self.fma(weight, inputs[v], tile[i])
                at = b.add(at, arg["x_stride"])
            return [self.step(offsets, 4), self.step(w, block_bytes), *tile]

        _, _, *tile = self.loop([arg["offsets"], w, *tile], block)
        return tile


class SparseConv(BlockSums, PixelWriter):
    """Block-sparse convolution.

    There may be more than R rows: of blocks at the same places, whose weights lie ``w_next`` bytes
    apart. They are computed for one tile of pixels after the other, whose inputs wait in the first
    cache.
    """

    arguments = (
        "x", "w", "offsets", "count", "x_stride", "y", "y_stride", "bias", "residual",
        "residual_stride", "mask", "rows", "bounds", "tiles", "w_next",
    )  # fmt: skip

    def tile(self, x: ir.Value, y: ir.Value, residual: ir.Value, mask: ir.Value) -> None:
        """Write what computes one tile of pixels, R rows at a time."""

        def part(
            w: ir.Value, y: ir.Value, residual: ir.Value, bias: ir.Value, left: ir.Value
        ) -> None:
            self.ask_ahead(y, residual)
            sums = self.block_sums(x, w, self.bias_tile(bias))
            self.finish_tile(sums, y, residual, mask, left)

        self.each_rows(y, residual, part)

    def ask_ahead(self, y: ir.Value, residual: ir.Value) -> None:
        """Ask for what R rows of a tile will write and add, to come while sums are computed.

        Where a residual lies elsewhere, for both: to ask for one of them gained nothing, as a tile
        then waited for the other.
        """
        b, arg = self.builder, self.arg
        self.ask_for_rows(y, arg["y_stride"], to_write=True)
        elsewhere = b.icmp_unsigned("!=", arg["residual"], arg["y"])
        some = b.icmp_unsigned("!=", arg["residual"], I64(0))
        with b.if_then(b.and_(some, elsewhere)):
            self.ask_for_rows(residual, arg["residual_stride"], to_write=False)


class SparseProduct(BlockSums):
    """The same sums without an epilogue: what stands between Winograd's transforms.

    From one tile to the next, inputs, weights and sums move by as many bytes as is said: along the
    pixels of a plane, or from plane to plane. With each of the first ``asks`` tiles the kernel asks
    for as many pixels of R rows from ``ask`` on, which the output transform will write: nobody
    computes while a burst of stores waits for the third cache.
    """

    arguments = (
        "x", "w", "offsets", "count", "x_stride", "y", "y_stride", "tiles", "x_step", "w_step",
        "y_step", "ask", "ask_stride", "asks",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg, width = self.builder, self.arg, self.kernel.width
        zero = ir.Constant(self.vector, None)
        size = self.lanes * FLOAT_BYTES

        def tile(state: list[ir.Value]) -> list[ir.Value]:
            x, w, y, ask, asks = state
            with b.if_then(b.icmp_signed(">", asks, I64(0))):
                self.ask_for_rows(ask, arg["ask_stride"], to_write=True)
            sums = self.block_sums(x, w, [zero] * (self.kernel.rows * width))
            at = y
            for r in range(self.kernel.rows):
                for v in range(width):
                    self.store(sums[r * width + v], self.step(at, v * size))
                at = b.add(at, arg["y_stride"])
            return [
                b.add(x, arg["x_step"]),
                b.add(w, arg["w_step"]),
                b.add(y, arg["y_step"]),
                self.step(ask, width * size),
                b.sub(asks, I64(1)),
            ]

        self.loop([arg[name] for name in ("x", "w", "y", "ask", "asks")], tile, arg["tiles"])
        b.ret_void()


class NMConv(PixelWriter):
    """Groups of one output channel against V vectors of pixels."""

    arguments = (
        "x", "w", "indices", "offsets", "count", "x_stride", "y", "y_stride", "bias", "residual",
        "residual_stride", "mask", "rows", "bounds", "tiles",
    )  # fmt: skip

    def tile(self, x: ir.Value, y: ir.Value, residual: ir.Value, mask: ir.Value) -> None:
        """Write what computes one tile of pixels."""
        b, kernel, arg = self.builder, self.kernel, self.arg
        bits = index_bits(kernel.group)

        def group(state: list[ir.Value]) -> list[ir.Value]:
            offsets, w, position, *tile = state
            offset = b.sext(self.load(I32, offsets), I64)
            base = b.add(x, b.shl(offset, I64(2)))
            for i in range(kernel.columns):
                index = self.nm_index(b.add(position, I64(i * bits)))
                at = b.add(base, b.mul(index, arg["x_stride"]))
                weight = self.splat(self.load(F32, self.step(w, i * FLOAT_BYTES)), self.vector)
                for v in range(kernel.width):
                    pixels = self.load(self.vector, self.step(at, v * self.lanes * FLOAT_BYTES))
                    tile[v] = self.fma(weight, pixels, tile[v])
            return [
                self.step(offsets, 4),
                self.step(w, kernel.columns * FLOAT_BYTES),
                b.add(position, I64(kernel.columns * bits)),
                *tile,
            ]

        start = [arg["offsets"], arg["w"], I64(0), *self.bias_tile(arg["bias"])]
        _, _, _, *tile = self.loop(start, group)
        self.finish_tile(tile, y, residual, mask, arg["rows"])

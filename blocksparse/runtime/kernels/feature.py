"""Products whose vectors run over output features: linear layers, for one image or a few."""

# R rows (output features) of a tile, J columns (input features) of a step, T images

from __future__ import annotations

from llvmlite import ir

from blocksparse.format.weights import index_bits

from .writer import F32, FLOAT_BYTES, I32, I64, Writer


class SparseLinear(Writer):
    """Blocks of R output by J input features against T images."""

    arguments = (
        "x", "x_stride", "w", "offsets", "count", "y", "y_stride", "bias", "rows", "bounds",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, kernel, arg = self.builder, self.kernel, self.arg
        images = kernel.width
        vector = ir.VectorType(F32, kernel.rows)
        # An FMA takes 4 cycles: with few images, several sums per image keep the unit busy.
        chains = min(kernel.columns, max(1, 4 // images))
        rows_x = [arg["x"]]
        for _ in range(1, images):
            rows_x.append(b.add(rows_x[-1], arg["x_stride"]))

        def block(state: list[ir.Value]) -> list[ir.Value]:
            offsets, w, *sums = state
            offset = b.shl(b.sext(self.load(I32, offsets), I64), I64(2))
            at = [b.add(x, offset) for x in rows_x]
            self.prefetch_weights(w, kernel.rows * kernel.columns * FLOAT_BYTES)
            for j in range(kernel.columns):
                weights = self.load(vector, self.step(w, j * kernel.rows * FLOAT_BYTES))
                for t in range(images):
                    x = self.splat(self.load(F32, self.step(at[t], j * FLOAT_BYTES)), vector)
                    i = t * chains + j % chains
                    sums[i] = self.fma(weights, x, sums[i])
            return [
                self.step(offsets, 4),
                self.step(w, kernel.rows * kernel.columns * FLOAT_BYTES),
                *sums,
            ]

        zero = ir.Constant(vector, None)
        bias = self.load(vector, arg["bias"])
        start = [bias if chain == 0 else zero for _ in range(images) for chain in range(chains)]
        _, _, *sums = self.loop([arg["offsets"], arg["w"], *start], block)
        outputs = []
        for t in range(images):
            total = sums[t * chains]
            for chain in range(1, chains):
                total = b.fadd(total, sums[t * chains + chain])
            outputs.append(self.clamp(total))
        self._store(outputs)

    def _store(self, outputs: list[ir.Value]) -> None:
        b, arg = self.builder, self.arg
        whole = b.icmp_signed("==", arg["rows"], I64(self.kernel.rows))
        with b.if_else(whole) as (all_rows, some_rows):
            with all_rows:
                for t, value in enumerate(outputs):
                    self.store(value, b.add(arg["y"], b.mul(arg["y_stride"], I64(t))))
            with some_rows:
                for t, value in enumerate(outputs):
                    at = b.add(arg["y"], b.mul(arg["y_stride"], I64(t)))
                    for r in range(self.kernel.rows):
                        with b.if_then(b.icmp_signed(">", arg["rows"], I64(r))):
                            element = b.extract_element(value, I32(r))
                            self.store(element, self.step(at, r * FLOAT_BYTES))
        b.ret_void()


class NMLinear(Writer):
    """Groups of one output feature against T images."""

    arguments = (
        "x", "x_stride", "w", "indices", "offsets", "count", "y", "y_stride", "bias", "rows",
        "bounds",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, kernel, arg = self.builder, self.kernel, self.arg
        images, kept = kernel.width, kernel.columns
        bits = index_bits(kernel.group)
        rows_x = [arg["x"]]
        for _ in range(1, images):
            rows_x.append(b.add(rows_x[-1], arg["x_stride"]))

        def group(state: list[ir.Value]) -> list[ir.Value]:
            offsets, w, position, *sums = state
            offset = b.sext(self.load(I32, offsets), I64)
            for i in range(kept):
                index = self.nm_index(b.add(position, I64(i * bits)))
                at = b.shl(b.add(offset, index), I64(2))
                weight = self.load(F32, self.step(w, i * FLOAT_BYTES))
                for t in range(images):
                    x = self.load(F32, b.add(rows_x[t], at))
                    sums[t * kept + i] = self.fma(weight, x, sums[t * kept + i])
            return [
                self.step(offsets, 4),
                self.step(w, kept * FLOAT_BYTES),
                b.add(position, I64(kept * bits)),
                *sums,
            ]

        bias = self.load(F32, arg["bias"])
        start = [F32(0) if i else bias for _ in range(images) for i in range(kept)]
        _, _, _, *sums = self.loop([arg["offsets"], arg["w"], I64(0), *start], group)
        for t in range(images):
            total = sums[t * kept]
            for i in range(1, kept):
                total = b.fadd(total, sums[t * kept + i])
            self.store(self.clamp(total), b.add(arg["y"], b.mul(arg["y_stride"], I64(t))))
        b.ret_void()

"""The micro-kernels, written as LLVM vector code.

Three products share one idea: activations lie in memory so that a whole vector is useful, a weight is broadcast against
it, and a zero weight skips the multiplication altogether.

- `sparse_conv`: a register tile of output channels by vectors of pixels, over the nonzero blocks of one block row (the
  block-sparse batch-reduce product of Tensor Processing Primitives). A convolution needs no im2col: every block carries
  the offset of its input channel and kernel position in the padded planar input.
- `nm_conv`: one output channel by many vectors of pixels, over N:M groups whose indices stay packed bits.
- `sparse_linear` and `nm_linear`: a linear layer has one pixel an image, so vectors run over output features instead, for
  one image or a few; packed N:M has one output feature at a time, and is a scalar product.

All arguments are 64-bit integers, addresses included, so one Numba intrinsic calls every kernel. Strides are in bytes.
"""

# R rows (output channels) of a tile, J columns (input channels) of a block, V vectors of pixels, T images, L lanes

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from .target import Target

_I8 = ir.IntType(8)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_F32 = ir.FloatType()
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Kernel:
    """A micro-kernel by its parameters.

    Parameters
    ----------
    op : {"sparse_conv", "nm_conv", "sparse_linear", "nm_linear"}
        Which product.
    rows : int
        Output channels in the tile.
    columns : int
        Input channels of a block; for N:M the nonzeros kept of each group (n).
    width : int
        Vectors of pixels, or images for the linear products.
    group : int
        For N:M the group length m, else 0.
    """

    op: str
    rows: int
    columns: int
    width: int
    group: int = 0

    @property
    def name(self) -> str:
        """The symbol: dtype, pattern, op, tile."""
        pattern, op = self.op.split("_")
        if pattern == "nm":
            block = f"nm{self.columns}of{self.group}"
        else:
            block = f"bsr{self.rows}x{self.columns}"
        return f"f32_{block}_{op}_{'v' if op == 'conv' else 't'}{self.width}"


def write(kernel: Kernel, target: Target) -> str:
    """Write a micro-kernel as LLVM IR.

    Parameters
    ----------
    kernel : Kernel
        What to write.
    target : Target
        What to write it for; gives triple and lanes.

    Returns
    -------
    str
        The text of an LLVM module with one function named ``kernel.name``.
    """
    module = ir.Module(name=kernel.name)
    module.triple = target.triple
    _WRITERS[kernel.op](module, kernel, target.lanes).write()
    return str(module)


def index_bits(m: int) -> int:
    """Bits of one packed N:M index: the smallest of 1, 2, 4, 8 that holds 0..m-1."""
    return next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)


class _Writer:
    """What the three products share: arguments, addresses, vectors, the counted loop and the epilogue."""

    arguments: tuple[str, ...]

    def __init__(self, module: ir.Module, kernel: Kernel, lanes: int) -> None:
        self.kernel = kernel
        self.lanes = lanes
        self.vector = ir.VectorType(_F32, lanes)
        signature = ir.FunctionType(ir.VoidType(), [_I64] * len(self.arguments))
        self.function = ir.Function(module, signature, name=kernel.name)
        self.arg = dict(zip(self.arguments, self.function.args, strict=True))
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.fmas: dict[ir.Type, ir.Function] = {}

    def load(self, kind: ir.Type, address: ir.Value, align: int = _FLOAT_BYTES) -> ir.Value:
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        return self.builder.load(pointer, align=align)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer, align=_FLOAT_BYTES)

    def step(self, address: ir.Value, count: int) -> ir.Value:
        """``address`` plus ``count`` bytes."""
        return self.builder.add(address, _I64(count)) if count else address

    def splat(self, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
        b = self.builder
        first = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
        lanes = ir.Constant(ir.VectorType(_I32, vector.count), None)
        return b.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        # llvmlite's own helper cannot spell vector types, so the intrinsic is declared by name.
        kind = a.type
        if kind not in self.fmas:
            name = (
                f"llvm.fma.v{kind.count}f32" if isinstance(kind, ir.VectorType) else "llvm.fma.f32"
            )
            self.fmas[kind] = ir.Function(
                self.function.module, ir.FunctionType(kind, [kind] * 3), name=name
            )
        return self.builder.call(self.fmas[kind], [a, b, c])

    def clamp(self, value: ir.Value) -> ir.Value:
        """Bound a value by the two floats at ``bounds``; NaN passes, as in PyTorch's ReLU."""
        b = self.builder
        low, high = (
            self.load(_F32, self.step(self.arg["bounds"], i * _FLOAT_BYTES)) for i in (0, 1)
        )
        if isinstance(value.type, ir.VectorType):
            low, high = self.splat(low, value.type), self.splat(high, value.type)
        value = b.select(b.fcmp_ordered("<", value, low), low, value)
        return b.select(b.fcmp_ordered(">", value, high), high, value)

    def nm_index(self, bit: ir.Value) -> ir.Value:
        """Read the packed index that starts at a bit of ``indices``."""
        b = self.builder
        bits = index_bits(self.kernel.group)
        at = b.add(self.arg["indices"], b.lshr(bit, _I64(3)))
        byte = b.zext(self.load(_I8, at, align=1), _I64)
        return b.and_(b.lshr(byte, b.and_(bit, _I64(7))), _I64((1 << bits) - 1))

    def loop(self, start: list[ir.Value], body) -> list[ir.Value]:  # type: ignore[no-untyped-def]
        """Run ``body(state) -> state`` ``count`` times, the state carried in registers."""
        b = self.builder
        before = b.block
        head = self.function.append_basic_block("loop")
        after = self.function.append_basic_block("done")
        count = self.arg["count"]
        b.cbranch(b.icmp_signed(">", count, _I64(0)), head, after)
        b.position_at_end(head)
        left = b.phi(_I64)
        left.add_incoming(count, before)
        state = []
        for value in start:
            phi = b.phi(value.type)
            phi.add_incoming(value, before)
            state.append(phi)
        result = body(state)
        remaining = b.sub(left, _I64(1))
        left.add_incoming(remaining, b.block)
        for phi, value in zip(state, result, strict=True):
            phi.add_incoming(value, b.block)
        tail = b.block
        b.cbranch(b.icmp_signed(">", remaining, _I64(0)), head, after)
        b.position_at_end(after)
        final = []
        for value, end in zip(start, result, strict=True):
            phi = b.phi(value.type)
            phi.add_incoming(value, before)
            phi.add_incoming(end, tail)
            final.append(phi)
        return final


class _PixelWriter(_Writer):
    """Epilogue of the products whose vectors run over pixels."""

    def bias_tile(self) -> list[ir.Value]:
        """Accumulators [R * V], each row starting from its bias."""
        tile = []
        for r in range(self.kernel.rows):
            bias = self.splat(
                self.load(_F32, self.step(self.arg["bias"], r * _FLOAT_BYTES)), self.vector
            )
            tile += [bias] * self.kernel.width
        return tile

    def finish(self, tile: list[ir.Value]) -> None:
        """Add the residual if there is one, clamp, zero the padding pixels, store the rows that exist."""
        b, width = self.builder, self.kernel.width
        done = self.function.append_basic_block("stored")
        has_residual = b.icmp_unsigned("!=", self.arg["residual"], _I64(0))
        bits = ir.IntType(self.lanes) if self.lanes >= 8 else _I8
        masks = []
        for v in range(width):
            word = self.load(bits, self.step(self.arg["mask"], v * bits.width // 8), align=1)
            if bits.width != self.lanes:
                word = b.trunc(word, ir.IntType(self.lanes))
            masks.append(b.bitcast(word, ir.VectorType(ir.IntType(1), self.lanes)))
        zero = ir.Constant(self.vector, None)
        for r in range(self.kernel.rows):
            row = self.function.append_basic_block(f"row{r}")
            b.cbranch(b.icmp_signed(">", self.arg["rows"], _I64(r)), row, done)
            b.position_at_end(row)
            plain = tile[r * width : (r + 1) * width]
            with b.if_then(has_residual):
                at = b.add(self.arg["residual"], b.mul(self.arg["residual_stride"], _I64(r)))
                added = [
                    b.fadd(x, self.load(self.vector, self.step(at, v * self.lanes * _FLOAT_BYTES)))
                    for v, x in enumerate(plain)
                ]
                inside = b.block
            merged = []
            for x, y in zip(plain, added, strict=True):
                phi = b.phi(self.vector)
                phi.add_incoming(x, row)
                phi.add_incoming(y, inside)
                merged.append(phi)
            at = b.add(self.arg["y"], b.mul(self.arg["y_stride"], _I64(r)))
            for v, x in enumerate(merged):
                value = b.select(masks[v], self.clamp(x), zero)
                self.store(value, self.step(at, v * self.lanes * _FLOAT_BYTES))
        b.branch(done)
        b.position_at_end(done)
        b.ret_void()


class _SparseConv(_PixelWriter):
    arguments = (
        "x", "w", "offsets", "count", "x_stride", "y", "y_stride", "bias", "residual", "residual_stride",
        "mask", "rows", "bounds",
    )  # fmt: skip

    def write(self) -> None:
        b, kernel, arg = self.builder, self.kernel, self.arg
        width = kernel.width
        block_bytes = kernel.rows * kernel.columns * _FLOAT_BYTES

        def block(state: list[ir.Value]) -> list[ir.Value]:
            offsets, w, *tile = state
            offset = b.sext(self.load(_I32, offsets), _I64)
            x = b.add(arg["x"], b.shl(offset, _I64(2)))
            for j in range(kernel.columns):
                inputs = [
                    self.load(self.vector, self.step(x, v * self.lanes * _FLOAT_BYTES))
                    for v in range(width)
                ]
                for r in range(kernel.rows):
                    at = self.step(w, (j * kernel.rows + r) * _FLOAT_BYTES)
                    weight = self.splat(self.load(_F32, at), self.vector)
                    for v in range(width):
                        i = r * width + v
                        tile[i] = self.fma(weight, inputs[v], tile[i])
                x = b.add(x, arg["x_stride"])
            return [self.step(offsets, 4), self.step(w, block_bytes), *tile]

        _, _, *tile = self.loop([arg["offsets"], arg["w"], *self.bias_tile()], block)
        self.finish(tile)


class _NMConv(_PixelWriter):
    arguments = (
        "x", "w", "indices", "offsets", "count", "x_stride", "y", "y_stride", "bias", "residual",
        "residual_stride", "mask", "rows", "bounds",
    )  # fmt: skip

    def write(self) -> None:
        b, kernel, arg = self.builder, self.kernel, self.arg
        bits = index_bits(kernel.group)

        def group(state: list[ir.Value]) -> list[ir.Value]:
            offsets, w, position, *tile = state
            offset = b.sext(self.load(_I32, offsets), _I64)
            base = b.add(arg["x"], b.shl(offset, _I64(2)))
            for i in range(kernel.columns):
                index = self.nm_index(b.add(position, _I64(i * bits)))
                x = b.add(base, b.mul(index, arg["x_stride"]))
                weight = self.splat(self.load(_F32, self.step(w, i * _FLOAT_BYTES)), self.vector)
                for v in range(kernel.width):
                    pixels = self.load(self.vector, self.step(x, v * self.lanes * _FLOAT_BYTES))
                    tile[v] = self.fma(weight, pixels, tile[v])
            return [
                self.step(offsets, 4),
                self.step(w, kernel.columns * _FLOAT_BYTES),
                b.add(position, _I64(kernel.columns * bits)),
                *tile,
            ]

        start = [arg["offsets"], arg["w"], _I64(0), *self.bias_tile()]
        _, _, _, *tile = self.loop(start, group)
        self.finish(tile)


class _SparseLinear(_Writer):
    arguments = (
        "x",
        "x_stride",
        "w",
        "offsets",
        "count",
        "y",
        "y_stride",
        "bias",
        "rows",
        "bounds",
    )

    def write(self) -> None:
        b, kernel, arg = self.builder, self.kernel, self.arg
        images = kernel.width
        vector = ir.VectorType(_F32, kernel.rows)
        # An FMA takes 4 cycles: with few images, several sums per image keep the unit busy.
        chains = min(kernel.columns, max(1, 4 // images))
        rows_x = [arg["x"]]
        for _ in range(1, images):
            rows_x.append(b.add(rows_x[-1], arg["x_stride"]))

        def block(state: list[ir.Value]) -> list[ir.Value]:
            offsets, w, *sums = state
            offset = b.shl(b.sext(self.load(_I32, offsets), _I64), _I64(2))
            at = [b.add(x, offset) for x in rows_x]
            for j in range(kernel.columns):
                weights = self.load(vector, self.step(w, j * kernel.rows * _FLOAT_BYTES))
                for t in range(images):
                    x = self.splat(self.load(_F32, self.step(at[t], j * _FLOAT_BYTES)), vector)
                    i = t * chains + j % chains
                    sums[i] = self.fma(weights, x, sums[i])
            return [
                self.step(offsets, 4),
                self.step(w, kernel.rows * kernel.columns * _FLOAT_BYTES),
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
        whole = b.icmp_signed("==", arg["rows"], _I64(self.kernel.rows))
        with b.if_else(whole) as (all_rows, some_rows):
            with all_rows:
                for t, value in enumerate(outputs):
                    self.store(value, b.add(arg["y"], b.mul(arg["y_stride"], _I64(t))))
            with some_rows:
                for t, value in enumerate(outputs):
                    at = b.add(arg["y"], b.mul(arg["y_stride"], _I64(t)))
                    for r in range(self.kernel.rows):
                        with b.if_then(b.icmp_signed(">", arg["rows"], _I64(r))):
                            element = b.extract_element(value, _I32(r))
                            self.store(element, self.step(at, r * _FLOAT_BYTES))
        b.ret_void()


class _NMLinear(_Writer):
    arguments = (
        "x", "x_stride", "w", "indices", "offsets", "count", "y", "y_stride", "bias", "rows", "bounds",
    )  # fmt: skip

    def write(self) -> None:
        b, kernel, arg = self.builder, self.kernel, self.arg
        images, kept = kernel.width, kernel.columns
        bits = index_bits(kernel.group)
        rows_x = [arg["x"]]
        for _ in range(1, images):
            rows_x.append(b.add(rows_x[-1], arg["x_stride"]))

        def group(state: list[ir.Value]) -> list[ir.Value]:
            offsets, w, position, *sums = state
            offset = b.sext(self.load(_I32, offsets), _I64)
            for i in range(kept):
                index = self.nm_index(b.add(position, _I64(i * bits)))
                at = b.shl(b.add(offset, index), _I64(2))
                weight = self.load(_F32, self.step(w, i * _FLOAT_BYTES))
                for t in range(images):
                    x = self.load(_F32, b.add(rows_x[t], at))
                    sums[t * kept + i] = self.fma(weight, x, sums[t * kept + i])
            return [
                self.step(offsets, 4),
                self.step(w, kept * _FLOAT_BYTES),
                b.add(position, _I64(kept * bits)),
                *sums,
            ]

        bias = self.load(_F32, arg["bias"])
        start = [_F32(0) if i else bias for _ in range(images) for i in range(kept)]
        _, _, _, *sums = self.loop([arg["offsets"], arg["w"], _I64(0), *start], group)
        for t in range(images):
            total = sums[t * kept]
            for i in range(1, kept):
                total = b.fadd(total, sums[t * kept + i])
            self.store(self.clamp(total), b.add(arg["y"], b.mul(arg["y_stride"], _I64(t))))
        b.ret_void()


_WRITERS: dict[str, type[_SparseConv | _NMConv | _SparseLinear | _NMLinear]] = {
    "sparse_conv": _SparseConv,
    "nm_conv": _NMConv,
    "sparse_linear": _SparseLinear,
    "nm_linear": _NMLinear,
}

"""The grammar of a micro-kernel: addresses, vectors, the counted loop and the clamp at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from blocksparse.format.weights import index_bits

from .kernel import Kernel

I8 = ir.IntType(8)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
FLOAT_BYTES = 4
LINE_BYTES = 64

WEIGHTS_AHEAD = 1024
"""Bytes between the weights in use and those asked for. The processor's own prefetcher stops at
every page of 4 KiB, and weights are read once: asking for them, and for the inputs of the next
block, took the dense 1x1 convolutions of ResNet-50's last stage from 3.5 to 2.1 ms.
"""

MASKED_STORE_LANES = 16
"""Vectors of so many lanes are stored under a mask at the price of any other. The instruction of
AVX2 takes a Zen 3 a dozen cycles, and others go lane by lane.
"""

Body = Callable[[list[ir.Value]], list[ir.Value]]


class Function:
    """Writes one function of 64-bit integers that returns nothing.

    Parameters
    ----------
    module : ir.Module
        Receives the function.
    name : str
        Its symbol.
    arguments : sequence of str
        Names of its arguments; ``count`` is what `loop` counts.
    lanes : int
        float32 values in one vector register.
    """

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[str], lanes: int) -> None:
        self.lanes = lanes
        self.vector = ir.VectorType(F32, lanes)
        signature = ir.FunctionType(ir.VoidType(), [I64] * len(arguments))
        self.function = ir.Function(module, signature, name=name)
        self.arg = dict(zip(arguments, self.function.args, strict=True))
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.declared: dict[str, ir.Function] = {}

    def load(self, kind: ir.Type, address: ir.Value, align: int = FLOAT_BYTES) -> ir.Value:
        """Read a value of a kind at an address."""
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        return self.builder.load(pointer, align=align)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Write a value at an address."""
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer, align=FLOAT_BYTES)

    def prefetch(self, address: ir.Value, to_write: bool = False) -> None:
        """Ask for a cache line that will be read soon; the address may be anything."""
        b, module = self.builder, self.function.module
        pointer = b.inttoptr(address, I8.as_pointer())
        name = "llvm.prefetch.p0"
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = module.globals.get(name) or ir.Function(module, kind, name=name)
        b.call(function, [pointer, I32(int(to_write)), I32(3), I32(1)])

    def prefetch_weights(self, w: ir.Value, nbytes: int) -> None:
        """Ask for as many bytes of weights, some steps ahead of ``w``."""
        for line in range(0, nbytes, LINE_BYTES):
            self.prefetch(self.step(w, WEIGHTS_AHEAD + line))

    def step(self, address: ir.Value, count: int) -> ir.Value:
        """``address`` plus ``count`` bytes."""
        return self.builder.add(address, I64(count)) if count else address

    def splat(self, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
        """Return a vector of equal values."""
        b = self.builder
        first = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
        lanes = ir.Constant(ir.VectorType(I32, vector.count), None)
        return b.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Return ``a * b + c``, rounded once."""
        kind = a.type
        form = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.intrinsic(f"llvm.fma.{form}", [a, b, c])

    def intrinsic(self, name: str, values: Sequence[ir.Value]) -> ir.Value:
        """Call an LLVM intrinsic that returns the type of its first operand."""
        # llvmlite's own helper cannot spell vector types, so the intrinsic is declared by name.
        if name not in self.declared:
            kind = ir.FunctionType(values[0].type, [value.type for value in values])
            self.declared[name] = ir.Function(self.function.module, kind, name=name)
        return self.builder.call(self.declared[name], values)

    def loop(
        self, start: list[ir.Value], body: Body, count: ir.Value | None = None
    ) -> list[ir.Value]:
        """Run ``body(state) -> state`` ``count`` times, the state carried in registers.

        The count is the argument of that name, unless another is given.
        """
        b = self.builder
        before = b.block
        head = self.function.append_basic_block("loop")
        after = self.function.append_basic_block("done")
        count = self.arg["count"] if count is None else count
        b.cbranch(b.icmp_signed(">", count, I64(0)), head, after)
        b.position_at_end(head)
        left = b.phi(I64)
        left.add_incoming(count, before)
        state = []
        for value in start:
            phi = b.phi(value.type)
            phi.add_incoming(value, before)
            state.append(phi)
        result = body(state)
        remaining = b.sub(left, I64(1))
        left.add_incoming(remaining, b.block)
        for phi, value in zip(state, result, strict=True):
            phi.add_incoming(value, b.block)
        tail = b.block
        b.cbranch(b.icmp_signed(">", remaining, I64(0)), head, after)
        b.position_at_end(after)
        final = []
        for value, end in zip(start, result, strict=True):
            phi = b.phi(value.type)
            phi.add_incoming(value, before)
            phi.add_incoming(end, tail)
            final.append(phi)
        return final


class Writer(Function):
    """Writes one micro-kernel; what the products share.

    Parameters
    ----------
    module : ir.Module
        Receives the function.
    kernel : Kernel
        What to write.
    lanes : int
        float32 values in one vector register.
    """

    arguments: tuple[str, ...]

    def __init__(self, module: ir.Module, kernel: Kernel, lanes: int) -> None:
        super().__init__(module, kernel.name, self.arguments, lanes)
        self.kernel = kernel

    def write(self) -> None:
        """Write the function."""
        raise NotImplementedError

    def clamp(self, value: ir.Value) -> ir.Value:
        """Bound a value by the two floats at ``bounds``; NaN passes, as in PyTorch's ReLU."""
        return self.between(value, *self.bounds(value.type))

    def bounds(self, kind: ir.Type) -> tuple[ir.Value, ir.Value]:
        """Read the two floats at ``bounds``, for values of a kind."""
        low, high = (self.load(F32, self.step(self.arg["bounds"], i * FLOAT_BYTES)) for i in (0, 1))
        if isinstance(kind, ir.VectorType):
            return self.splat(low, kind), self.splat(high, kind)
        return low, high

    def between(self, value: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
        """Bound a value; NaN passes."""
        b = self.builder
        value = b.select(b.fcmp_ordered("<", value, low), low, value)
        return b.select(b.fcmp_ordered(">", value, high), high, value)

    def constant(self, value: float) -> ir.Constant:
        """Return a vector of one number."""
        return ir.Constant(self.vector, [ir.Constant(F32, value)] * self.lanes)

    def largest(self, values: list[ir.Value]) -> ir.Value:
        """Return the largest of some vectors; a NaN wins, as in PyTorch's pools.

        To look for it after every comparison took a max pool of 3 x 3 in the first cache 1.1 times
        as long (Zen 4).
        """
        b = self.builder
        kept, *others = values
        total, missing = kept, None
        for value in others:
            # false for a NaN: one in `total` stays, and one in `value` is looked for, two at a time
            total = b.select(b.fcmp_ordered(">", value, total), value, total)
        for i in range(0, len(others), 2):
            found = b.fcmp_unordered("uno", others[i], others[i + 1 if i + 1 < len(others) else i])
            missing = found if missing is None else b.or_(missing, found)
        return total if missing is None else b.select(missing, self.constant(float("nan")), total)

    @property
    def bit_bytes(self) -> int:
        """Bytes of the mask of one vector."""
        return max(1, self.lanes // 8)

    def mask(self, address: ir.Value) -> ir.Value:
        """Read the mask of one vector, first lane in the lowest bit."""
        b = self.builder
        kind = ir.IntType(self.lanes) if self.lanes >= 8 else I8
        word = self.load(kind, address, align=1)
        if kind.width != self.lanes:
            word = b.trunc(word, ir.IntType(self.lanes))
        return b.bitcast(word, ir.VectorType(ir.IntType(1), self.lanes))

    def store_first(self, value: ir.Value, address: ir.Value, mask: ir.Value) -> None:
        """Write the lanes of a mask, the first so many: behind a row may lie another item."""
        if self.lanes >= MASKED_STORE_LANES:
            self._store_masked(value, address, mask)
            return
        b, bits = self.builder, ir.IntType(self.lanes)
        word = b.bitcast(mask, bits)
        with b.if_else(b.icmp_unsigned("==", word, bits(-1))) as (all_lanes, some_lanes):
            with all_lanes:
                self.store(value, address)
            with some_lanes:
                self._store_halves(value, address, word)

    def _store_halves(self, value: ir.Value, address: ir.Value, word: ir.Value) -> None:
        """Write lanes by halves, quarters and so on, each if the mask has all of it."""
        b, half = self.builder, value.type.count // 2
        low, high = self.halves(value)
        whole = b.trunc(b.lshr(word, word.type(half - 1)), ir.IntType(1))
        with b.if_then(whole):
            self.store(low, address)
        if half > 1:
            rest = b.select(whole, high, low)
            to = b.select(whole, self.step(address, half * FLOAT_BYTES), address)
            left = b.select(whole, b.lshr(word, word.type(half)), word)
            self._store_halves(rest, to, left)

    def _store_masked(self, value: ir.Value, address: ir.Value, mask: ir.Value) -> None:
        b, module = self.builder, self.function.module
        pointer = b.inttoptr(address, self.vector.as_pointer())
        name = f"llvm.masked.store.v{self.lanes}f32.p0"
        kind = ir.FunctionType(ir.VoidType(), [self.vector, pointer.type, I32, mask.type])
        function = module.globals.get(name) or ir.Function(module, kind, name=name)
        b.call(function, [value, pointer, I32(FLOAT_BYTES), mask])

    def shuffle(self, a: ir.Value, b: ir.Value, places: list[int]) -> ir.Value:
        """Gather lanes of two vectors."""
        mask = ir.Constant(ir.VectorType(I32, len(places)), [I32(place) for place in places])
        return self.builder.shuffle_vector(a, b, mask)

    def halves(self, value: ir.Value) -> list[ir.Value]:
        """Return the lower and the upper lanes of a vector."""
        half = value.type.count // 2
        return [self.shuffle(value, value, list(range(c, c + half))) for c in (0, half)]

    def apart(self, vectors: list[ir.Value]) -> list[ir.Value]:
        """Shuffle one, two or four vectors of pixels into every first, second or fourth."""
        lanes, half = self.lanes, self.lanes // 2
        if len(vectors) == 1:
            return vectors
        if len(vectors) == 2:
            a, b = vectors
            return [self.shuffle(a, b, list(range(c, 2 * lanes, 2))) for c in (0, 1)]
        columns = []
        for first in (0, 2):
            places = [4 * i + c for c in (first, first + 1) for i in range(half)]
            low = self.shuffle(vectors[0], vectors[1], places)
            high = self.shuffle(vectors[2], vectors[3], places)
            for c in (0, half):
                take = [*range(c, c + half), *range(lanes + c, lanes + c + half)]
                columns.append(self.shuffle(low, high, take))
        return columns

    def nm_index(self, bit: ir.Value) -> ir.Value:
        """Read the packed index that starts at a bit of ``indices``."""
        b = self.builder
        bits = index_bits(self.kernel.group)
        at = b.add(self.arg["indices"], b.lshr(bit, I64(3)))
        byte = b.zext(self.load(I8, at, align=1), I64)
        return b.and_(b.lshr(byte, b.and_(bit, I64(7))), I64((1 << bits) - 1))

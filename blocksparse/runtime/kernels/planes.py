"""Steps that move or combine whole pixels: pools, and the split into column phases.

Vectors run over the pixels of an output row. With stride 2, two vectors of input are read and
shuffled apart into even and odd pixels.
"""

from __future__ import annotations

from llvmlite import ir

from .writer import F32, FLOAT_BYTES, I32, I64, Writer


class PlaneWriter(Writer):
    """Loops over channels, their rows and the vectors of a row."""

    def row_at(self, x: ir.Value, place: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Whether a row is inside the image, and the address of the nearest row that is."""
        b, arg = self.builder, self.arg
        below = b.icmp_signed("<", place, I64(0))
        beyond = b.icmp_signed(">=", place, arg["height"])
        nearest = b.select(below, I64(0), place)
        nearest = b.select(beyond, b.sub(arg["height"], I64(1)), nearest)
        return b.not_(b.or_(below, beyond)), b.add(x, b.mul(nearest, arg["x_row"]))

    def vectors_at(self, x: ir.Value, stride: int, column: int) -> list[ir.Value]:
        """Read the pixels from a column on, a vector for each step of the stride."""
        return [
            self.load(self.vector, self.step(x, (column + i * self.lanes) * FLOAT_BYTES))
            for i in range(stride)
        ]

    def apart(self, vectors: list[ir.Value]) -> list[ir.Value]:
        """One vector as it is, two shuffled into every other pixel, the even ones first."""
        if len(vectors) == 1:
            return vectors
        pair = []
        for odd in (0, 1):
            places = [I32(2 * lane + odd) for lane in range(self.lanes)]
            mask = ir.Constant(ir.VectorType(I32, self.lanes), places)
            pair.append(self.builder.shuffle_vector(*vectors, mask))
        return pair


class PhaseCopy(PlaneWriter):
    """Every second pixel of rows, all channels: one or both column phases of one row phase.

    Output row r comes from input row ``top + r * stride``, or is zero where that is outside.
    """

    arguments = (
        "x", "x_row", "x_channel", "top", "height", "stride", "even", "odd", "y_row", "y_channel",
        "masks", "within", "channels", "count", "vectors",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg = self.builder, self.arg
        zero = ir.Constant(self.vector, None)
        size = self.lanes * FLOAT_BYTES
        # the masks of the odd phase lie behind those of the even one
        masks_odd = b.add(arg["masks"], b.mul(arg["vectors"], I64(self.bit_bytes)))
        has_odd = b.icmp_unsigned("!=", arg["odd"], I64(0))

        def channel(state: list[ir.Value]) -> list[ir.Value]:
            x_start, y_start = state

            def row(state: list[ir.Value]) -> list[ir.Value]:
                place, y = state
                valid, x = self.row_at(x_start, place)

                def vector(state: list[ir.Value]) -> list[ir.Value]:
                    at, bit = state
                    even, odd = self.apart(self.vectors_at(b.add(x, b.shl(at, I64(1))), 2, 0))
                    within = self.mask(b.add(arg["within"], bit))
                    to = b.add(y, at)
                    inside = self.mask(b.add(arg["masks"], bit))
                    even = b.select(valid, b.select(inside, even, zero), zero)
                    self.store_first(even, b.add(arg["even"], to), within)
                    with b.if_then(has_odd):
                        inside = self.mask(b.add(masks_odd, bit))
                        odd = b.select(valid, b.select(inside, odd, zero), zero)
                        self.store_first(odd, b.add(arg["odd"], to), within)
                    return [self.step(at, size), self.step(bit, self.bit_bytes)]

                self.loop([I64(0), I64(0)], vector, arg["vectors"])
                return [b.add(place, arg["stride"]), b.add(y, arg["y_row"])]

            self.loop([arg["top"], y_start], row)
            return [b.add(x_start, arg["x_channel"]), b.add(y_start, arg["y_channel"])]

        self.loop([arg["x"], I64(0)], channel, arg["channels"])
        b.ret_void()


class Pool(PlaneWriter):
    """Maximum or average over windows of ``rows x columns`` at column stride ``width``.

    The maximum reads rows outside the image as the nearest row inside, which is in the window too;
    the average takes them as zero. Columns outside are masked.
    """

    arguments = (
        "x", "x_row", "x_channel", "top", "height", "stride", "y", "y_row", "y_channel", "masks",
        "within", "divisors", "divisors_row", "channels", "count", "vectors",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg, kernel = self.builder, self.arg, self.kernel
        size = self.lanes * FLOAT_BYTES
        largest = kernel.op == "pool_max"
        zero = ir.Constant(self.vector, None)
        empty = zero
        if largest:
            empty = ir.Constant(self.vector, [ir.Constant(F32, float("-inf"))] * self.lanes)
        combine = self.larger if largest else b.fadd
        per_column = b.mul(arg["vectors"], I64(self.bit_bytes))

        def channel(state: list[ir.Value]) -> list[ir.Value]:
            x_start, y_start = state

            def row(state: list[ir.Value]) -> list[ir.Value]:
                top, y, divisors = state
                rows = [self.row_at(x_start, b.add(top, I64(i))) for i in range(kernel.rows)]

                def vector(state: list[ir.Value]) -> list[ir.Value]:
                    at, bit = state
                    masks = b.add(arg["masks"], bit)
                    insides = []
                    for _ in range(kernel.columns):
                        insides.append(self.mask(masks))
                        masks = b.add(masks, per_column)
                    ahead = b.mul(at, I64(kernel.width))
                    total = empty
                    for j in range(0, kernel.columns, kernel.width):
                        # down the rows first, so that one row is left to shuffle and to mask
                        below = [empty] * kernel.width
                        for valid, x in rows:
                            vectors = self.vectors_at(b.add(x, ahead), kernel.width, j)
                            if not largest:
                                vectors = [b.select(valid, vector, zero) for vector in vectors]
                            below = [combine(*pair) for pair in zip(below, vectors, strict=True)]
                        for k, value in enumerate(self.apart(below)[: kernel.columns - j]):
                            total = combine(total, b.select(insides[j + k], value, empty))
                    if not largest:
                        total = b.fdiv(total, self.load(self.vector, b.add(divisors, at)))
                    within = b.add(arg["within"], bit)
                    inside = self.mask(b.add(within, per_column))
                    value = b.select(inside, total, zero)
                    self.store_first(value, b.add(y, at), self.mask(within))
                    return [self.step(at, size), self.step(bit, self.bit_bytes)]

                self.loop([I64(0), I64(0)], vector, arg["vectors"])
                return [
                    b.add(top, arg["stride"]),
                    b.add(y, arg["y_row"]),
                    b.add(divisors, arg["divisors_row"]),
                ]

            self.loop([arg["top"], y_start, arg["divisors"]], row)
            return [b.add(x_start, arg["x_channel"]), b.add(y_start, arg["y_channel"])]

        self.loop([arg["x"], arg["y"]], channel, arg["channels"])
        b.ret_void()

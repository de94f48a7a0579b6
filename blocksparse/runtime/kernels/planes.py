"""Steps that move or combine whole pixels: pools, means, and the split into column phases.

Vectors run over the pixels of an output row. With stride 2, two vectors of input are read and
shuffled apart into even and odd pixels.
"""

from __future__ import annotations

from functools import reduce

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

    def vectors_at(self, x: ir.Value, stride: int) -> list[ir.Value]:
        """Read pixels, a vector for each step of the stride."""
        size = self.lanes * FLOAT_BYTES
        return [self.load(self.vector, self.step(x, i * size)) for i in range(stride)]


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
                    even, odd = self.apart(self.vectors_at(b.add(x, b.shl(at, I64(1))), 2))
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

    The rows of a window are combined first, once for all windows that share their columns, which
    then are the lanes of two vectors that lie beside each other. The maximum reads rows outside the
    image as the nearest row inside, which is in the window too; the average takes them as zero.
    Columns outside are masked.
    """

    arguments = (
        "x", "x_row", "x_channel", "top", "height", "stride", "y", "y_row", "y_channel", "masks",
        "within", "divisors", "divisors_row", "channels", "count", "vectors",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg, kernel = self.builder, self.arg, self.kernel
        size = self.lanes * FLOAT_BYTES
        per_column = b.mul(arg["vectors"], I64(self.bit_bytes))
        beyond = kernel.columns > kernel.width  # a window reaches into the vectors that follow

        def channel(state: list[ir.Value]) -> list[ir.Value]:
            x_start, y_start = state

            def row(state: list[ir.Value]) -> list[ir.Value]:
                top, y, divisors = state
                rows = [self.row_at(x_start, b.add(top, I64(i))) for i in range(kernel.rows)]

                def vector(state: list[ir.Value]) -> list[ir.Value]:
                    at, bit, *columns = state
                    following = self.down(rows, self.step(at, size)) if beyond else []
                    columns = columns or self.down(rows, at)
                    total = self.along(columns, following, b.add(arg["masks"], bit), per_column)
                    if not self.is_max:
                        total = b.fdiv(total, self.load(self.vector, b.add(divisors, at)))
                    within = b.add(arg["within"], bit)
                    inside = self.mask(b.add(within, per_column))
                    value = b.select(inside, total, ir.Constant(self.vector, None))
                    self.store_first(value, b.add(y, at), self.mask(within))
                    return [self.step(at, size), self.step(bit, self.bit_bytes), *following]

                first = self.down(rows, I64(0)) if beyond else []
                self.loop([I64(0), I64(0), *first], vector, arg["vectors"])
                return [
                    b.add(top, arg["stride"]),
                    b.add(y, arg["y_row"]),
                    b.add(divisors, arg["divisors_row"]),
                ]

            self.loop([arg["top"], y_start, arg["divisors"]], row)
            return [b.add(x_start, arg["x_channel"]), b.add(y_start, arg["y_channel"])]

        self.loop([arg["x"], arg["y"]], channel, arg["channels"])
        b.ret_void()

    @property
    def is_max(self) -> bool:
        """Whether it takes the maximum."""
        return self.kernel.op == "pool_max"

    def combine(self, values: list[ir.Value]) -> ir.Value:
        """Return the largest of some values, or their sum."""
        return self.largest(values) if self.is_max else reduce(self.builder.fadd, values)

    def down(self, rows: list[tuple[ir.Value, ir.Value]], at: ir.Value) -> list[ir.Value]:
        """Combine the rows of a window from a column on, each step of the stride in its vector."""
        b, width = self.builder, self.kernel.width
        zero = ir.Constant(self.vector, None)
        window = []
        for valid, x in rows:
            vectors = self.vectors_at(b.add(x, b.mul(at, I64(width))), width)
            if not self.is_max:
                vectors = [b.select(valid, vector, zero) for vector in vectors]
            window.append(vectors)
        return self.apart([self.combine(list(below)) for below in zip(*window, strict=True)])

    def along(
        self, columns: list[ir.Value], following: list[ir.Value], masks: ir.Value, step: ir.Value
    ) -> ir.Value:
        """Combine the columns of a window, of which the last lie in the vectors that follow."""
        b, width = self.builder, self.kernel.width
        outside = self.constant(float("-inf") if self.is_max else 0.0)
        values = []
        for j in range(self.kernel.columns):
            first, value = j // width, columns[j % width]
            if first:
                places = list(range(first, first + self.lanes))
                value = self.shuffle(value, following[j % width], places)
            values.append(b.select(self.mask(masks), value, outside))
            masks = b.add(masks, step)
        return self.combine(values)


class Mean(Writer):
    """Average of all pixels of an image, channel by channel; its rows lie in two pieces, or one.

    Each lane of a row adds up on its own, then rows, then lanes in pairs: no sum is as long as an
    image, so that little is rounded.
    """

    arguments = (
        "x", "x_row", "x_channel", "height", "lower", "lower_row", "lower_channel", "lower_height",
        "y", "y_channel", "masks", "vectors", "pixels", "count",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg = self.builder, self.arg
        pixels = self.load(F32, arg["pixels"])

        def channel(state: list[ir.Value]) -> list[ir.Value]:
            upper, lower, y = state
            total = ir.Constant(self.vector, None)
            total = self.rows(upper, arg["x_row"], arg["height"], total)
            total = self.rows(lower, arg["lower_row"], arg["lower_height"], total)
            self.store(b.fdiv(self.sum_of(total), pixels), y)
            return [
                b.add(upper, arg["x_channel"]),
                b.add(lower, arg["lower_channel"]),
                b.add(y, arg["y_channel"]),
            ]

        self.loop([arg["x"], arg["lower"], arg["y"]], channel)
        b.ret_void()

    def rows(self, x: ir.Value, stride: ir.Value, count: ir.Value, total: ir.Value) -> ir.Value:
        """Add the pixels of rows to the lanes of a vector."""
        b, arg = self.builder, self.arg
        zero = ir.Constant(self.vector, None)

        def row(state: list[ir.Value]) -> list[ir.Value]:
            start, total = state

            def vector(state: list[ir.Value]) -> list[ir.Value]:
                at, masks, along = state
                inside = b.select(self.mask(masks), self.load(self.vector, at), zero)
                following = self.step(at, self.lanes * FLOAT_BYTES)
                return [following, self.step(masks, self.bit_bytes), b.fadd(along, inside)]

            *_, along = self.loop([start, arg["masks"], zero], vector, arg["vectors"])
            return [b.add(start, stride), b.fadd(total, along)]

        return self.loop([x, total], row, count)[1]

    def sum_of(self, value: ir.Value) -> ir.Value:
        """Add the lanes of a vector."""
        while value.type.count > 1:
            value = self.builder.fadd(*self.halves(value))
        return self.builder.extract_element(value, I32(0))

"""Winograd's transforms down the columns: rows of pixels to planes, and planes to rows of outputs.

One call covers one tile row of an image, all its columns, a vector at a time, and many channels.
The matrices are constants of the code: a zero costs nothing, any other entry one FMA at most.
"""

# F(m, r), r = kernel.width: n = m + r - 1 rows of a tile and planes, m output rows of a tile

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from .activations import ending
from .winograd_matrices import FILTERINGS, Filtering
from .writer import F32, FLOAT_BYTES, I64, Writer


class Transform(Writer):
    """Sums weighted by the rows of a constant matrix, and the order of pixels that they need."""

    @property
    def filtering(self) -> Filtering:
        """The matrices."""
        return FILTERINGS[self.kernel.width]

    def into_planes(self, values: list[ir.Value]) -> list[ir.Value]:
        """Multiply by B: n values to n planes.

        The polynomials of opposite points, two rows of B, differ in the signs of the odd powers. So
        both are made of the same two sums, the odd one times the point. That is the coefficient
        below the highest, which is 1: all other roots are 0 or pairs of opposites.
        """
        matrix = self.filtering.input
        planes = [self.combine(matrix[0], values)]
        for row in matrix[1:-1:2]:
            even, odd, point = row[0::2], row[1::2], row[-3]
            common = self.combine([weight / point for weight in odd], values[1::2])
            even = self.combine(even, values[0::2])
            planes += [self.fma(self.constant(x), common, even) for x in (point, -point)]
        return [*planes, self.combine(matrix[-1], values)]

    def into_outputs(self, planes: list[ir.Value]) -> list[ir.Value]:
        """Multiply by A: n planes to m values. Rows weigh opposite points alike, but for signs."""
        b = self.builder
        zero, *finite, infinity = planes
        pairs = list(zip(finite[::2], finite[1::2], strict=True))
        by_parity = [b.fadd(x, y) for x, y in pairs], [b.fsub(x, y) for x, y in pairs]
        return [
            self.combine([row[0], *row[1:-1:2], row[-1]], [zero, *by_parity[power % 2], infinity])
            for power, row in enumerate(self.filtering.output)
        ]

    def combine(self, row: list[float], values: list[ir.Value]) -> ir.Value:
        """Return the sum of the values, weighted by a row of a matrix.

        It begins with one of weight 1, if there is any, which then takes no multiplication.
        """
        terms = [pair for pair in zip(row, values, strict=True) if pair[0] != 0]
        (weight, total), *rest = sorted(terms, key=lambda pair: pair[0] != 1)
        if weight != 1:
            total = self.builder.fmul(total, self.constant(weight))
        for weight, value in rest:
            if abs(weight) == 1:
                add = self.builder.fadd if weight == 1 else self.builder.fsub
                total = add(total, value)
            else:
                total = self.fma(self.constant(weight), value, total)
        return total

    def each_output(
        self, channel: Callable[[ir.Value, ir.Value, ir.Value, ir.Value], None]
    ) -> None:
        """Write ``channel(x, y, residual, bias)`` for every output channel, and the return."""
        b, arg = self.builder, self.arg

        def one(state: list[ir.Value]) -> list[ir.Value]:
            x, y, residual, bias_at = state
            channel(x, y, residual, self.splat(self.load(F32, bias_at), self.vector))
            return [
                b.add(x, arg["x_channel"]),
                b.add(y, arg["y_channel"]),
                b.add(residual, arg["residual_channel"]),
                self.step(bias_at, FLOAT_BYTES),
            ]

        self.loop([arg["x"], arg["y"], arg["residual"], arg["bias"]], one, arg["channels"])
        b.ret_void()

    def plus(self, value: ir.Value, residual: ir.Value, is_there: ir.Value) -> ir.Value:
        """Add the vector at an address, if there is one: elsewhere nothing may be read."""
        b = self.builder
        start = b.block
        with b.if_then(is_there):
            added = b.fadd(value, self.load(self.vector, residual))
            end = b.block
        merged = b.phi(self.vector)
        merged.add_incoming(value, start)
        merged.add_incoming(added, end)
        return merged

    def together(self, columns: list[ir.Value]) -> list[ir.Value]:
        """Two or four columns of tiles as wide to as many vectors of pixels."""
        lanes, half = self.lanes, self.lanes // 2
        vectors = []
        for start in (0, half):
            places = [j for i in range(start, start + half) for j in (i, lanes + i)]
            pairs = [
                self.shuffle(a, b, places) for a, b in zip(columns[::2], columns[1::2], strict=True)
            ]
            if len(pairs) == 1:
                vectors += pairs
                continue
            for quarter in (0, half):
                take = [
                    place
                    for i in range(quarter, quarter + half, 2)
                    for place in (i, i + 1, lanes + i, lanes + i + 1)
                ]
                vectors.append(self.shuffle(pairs[0], pairs[1], take))
        return vectors


class WinogradInput(Transform):
    """Rows of all channels to the planes of one tile row.

    Rows outside the image are read from ``zeros``. Where ``first`` is not 0, a vector of zeros is
    written in front of every plane: the left padding of the band's first row.
    """

    arguments = (
        "x", "x_row", "x_channel", "top", "height", "zeros", "y", "y_plane", "y_channel", "first",
        "channels", "count",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg = self.builder, self.arg
        size = self.lanes * FLOAT_BYTES
        starts, strides = [], []
        for i in range(self.filtering.planes):
            place = b.add(arg["top"], I64(i))
            # negative places are large as unsigned
            valid = b.icmp_unsigned("<", place, arg["height"])
            row = b.add(arg["x"], b.mul(place, arg["x_row"]))
            starts.append(b.select(valid, row, arg["zeros"]))
            strides.append(b.select(valid, arg["x_channel"], I64(0)))
        is_first = b.icmp_unsigned("!=", arg["first"], I64(0))
        zero = ir.Constant(self.vector, None)

        def channel(state: list[ir.Value]) -> list[ir.Value]:
            y, *rows = state
            with b.if_then(is_first):
                lead = b.sub(y, I64(size))
                for _ in range(self.filtering.planes):
                    self.store(zero, lead)
                    lead = b.add(lead, arg["y_plane"])

            def vector(state: list[ir.Value]) -> list[ir.Value]:
                (at,) = state
                pixels = [self.load(self.vector, b.add(row, at)) for row in rows]
                to = b.add(y, at)
                for plane in self.into_planes(pixels):
                    self.store(plane, to)
                    to = b.add(to, arg["y_plane"])
                return [self.step(at, size)]

            self.loop([I64(0)], vector)
            following = [b.add(row, stride) for row, stride in zip(rows, strides, strict=True)]
            return [b.add(y, arg["y_channel"]), *following]

        self.loop([arg["y"], *starts], channel, arg["channels"])
        b.ret_void()


class WinogradOutput(Transform):
    """Planes of one tile row to rows of some output channels, through the epilogue."""

    arguments = (
        "x", "x_plane", "x_channel", "y", "y_row", "y_channel", "residual", "residual_row",
        "residual_channel", "bias", "inside", "within", "rows", "bounds", "channels", "count",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg = self.builder, self.arg
        has_residual = b.icmp_unsigned("!=", arg["residual"], I64(0))
        zero = ir.Constant(self.vector, None)
        end = ending(self, self.vector)

        def channel(
            x_start: ir.Value, y_start: ir.Value, residual: ir.Value, bias: ir.Value
        ) -> None:
            def vector(state: list[ir.Value]) -> list[ir.Value]:
                at, bits = state
                x = b.add(x_start, at)
                planes = []
                for _ in range(self.filtering.planes):
                    planes.append(self.load(self.vector, x))
                    x = b.add(x, arg["x_plane"])
                inside, within = (
                    self.mask(b.add(arg[name], bits)) for name in ("inside", "within")
                )
                y, beside = b.add(y_start, at), b.add(residual, at)
                for i, sums in enumerate(self.into_outputs(planes)):
                    value = b.fadd(sums, bias)
                    with b.if_then(b.icmp_signed(">", arg["rows"], I64(i))):
                        # beyond the row lies another one, or padding: always memory of ours
                        whole = self.plus(value, beside, has_residual)
                        ended = b.select(inside, end(whole), zero)
                        self.store_first(ended, y, within)
                    y, beside = b.add(y, arg["y_row"]), b.add(beside, arg["residual_row"])
                return [self.step(at, self.lanes * FLOAT_BYTES), self.step(bits, self.bit_bytes)]

            self.loop([I64(0), I64(0)], vector)

        self.each_output(channel)

"""Winograd's transforms in both directions: tiles of 6 x 6 pixels to 36 planes, and back to 4 x 4.

A vector holds one pixel of each of as many tiles as it has lanes. The tiles of a *unit*, one
vector, lie side by side in one tile row, or, where an image is narrow, in two or four rows, so that
its lanes are used. Pixels come and go as whole vectors along rows: four of them are shuffled into
the four columns of the tiles.
"""

# L lanes; G tile rows of a unit (kernel.columns), each L / G tiles wide

from __future__ import annotations

from llvmlite import ir

from .activations import ending
from .transforms import Transform
from .winograd_matrices import OUTPUTS, PLANES
from .writer import FLOAT_BYTES, I64, LINE_BYTES


class _Tiles(Transform):
    def chunks(self, width: int) -> list[tuple[int, int]]:
        """Tile row and first pixel of each vector along a row of tiles that are so wide."""
        per_row = width // self.kernel.columns
        return [(i // per_row, i % per_row * self.lanes) for i in range(width)]


class TileInput(_Tiles):
    """Pixels of all channels to the planes of one unit.

    Rows outside the image are read from ``zeros``; columns outside are masked. The masks are those
    of the four vectors from the tiles' first column on, then from their fifth.
    """

    arguments = (
        "x", "x_row", "x_channel", "top", "height", "zeros", "masks", "y", "y_plane", "y_channel",
        "channels",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg = self.builder, self.arg
        down = b.mul(arg["y_plane"], I64(PLANES))
        masks = [self.mask(self.step(arg["masks"], i * self.bit_bytes)) for i in range(2 * OUTPUTS)]
        starts, strides = [], []
        for group in range(self.kernel.columns):
            for i in range(PLANES):
                place = b.add(arg["top"], I64(group * OUTPUTS + i))
                # negative places are large as unsigned
                valid = b.icmp_unsigned("<", place, arg["height"])
                row = b.add(arg["x"], b.mul(place, arg["x_row"]))
                starts.append(b.select(valid, row, arg["zeros"]))
                strides.append(b.select(valid, arg["x_channel"], I64(0)))

        def channel(state: list[ir.Value]) -> list[ir.Value]:
            y, *rows = state
            self.ask_for_rows(rows, strides)
            # along the rows as they come, then down the columns: at most 36 values are alive
            along = []
            for i in range(PLANES):
                pieces = rows[i::PLANES]
                found = self.apart([self.part(pieces, masks, q) for q in range(OUTPUTS)])
                along.append(self.into_planes([*found, *self.beyond(found, pieces, masks)]))
            for column in zip(*along, strict=True):
                to = y
                for plane in self.into_planes(list(column)):
                    self.store(plane, to)
                    to = b.add(to, down)
                y = b.add(y, arg["y_plane"])
            following = [b.add(row, stride) for row, stride in zip(rows, strides, strict=True)]
            return [b.add(state[0], arg["y_channel"]), *following]

        self.loop([arg["y"], *starts], channel, arg["channels"])
        b.ret_void()

    def ask_for_rows(self, rows: list[ir.Value], strides: list[ir.Value]) -> None:
        """Ask for the rows of the channel after the next: they lie a plane away from these."""
        size = OUTPUTS * self.lanes * FLOAT_BYTES // self.kernel.columns
        for row, stride in zip(rows, strides, strict=True):
            at = self.builder.add(row, self.builder.mul(stride, I64(2)))
            for line in range(0, size, LINE_BYTES):
                self.prefetch(self.step(at, line))

    def part(
        self, rows: list[ir.Value], masks: list[ir.Value], q: int, beyond: bool = False
    ) -> ir.Value:
        """Read a vector of a row of tiles, or what lies from its fifth pixel on."""
        group, pixel = self.chunks(OUTPUTS)[q]
        at = self.step(rows[group], (pixel + OUTPUTS * beyond) * FLOAT_BYTES)
        mask = masks[q + OUTPUTS * beyond]
        value = self.load(self.vector, at)
        return self.builder.select(mask, value, ir.Constant(self.vector, None))

    def beyond(
        self, columns: list[ir.Value], rows: list[ir.Value], masks: list[ir.Value]
    ) -> list[ir.Value]:
        """Return the fifth and sixth columns of the tiles: the first two of the next ones.

        In one tile row only those of the last tile have to be read. In several it is as quick to
        read and shuffle all of them.
        """
        if self.kernel.columns > 1:
            vectors = [self.part(rows, masks, q, beyond=True) for q in range(OUTPUTS)]
            return self.apart(vectors)[: PLANES - OUTPUTS]
        last = self.part(rows, masks, OUTPUTS - 1, beyond=True)
        following, first = list(range(1, self.lanes)), 2 * self.lanes - OUTPUTS
        return [
            self.shuffle(column, last, [*following, first + c])
            for c, column in enumerate(columns[: PLANES - OUTPUTS])
        ]


class TileOutput(_Tiles):
    """Planes of one unit to rows of some output channels, through the epilogue.

    The masks are those of the pixels inside the image, then of all a row holds. Where kernel.rows
    is 2, the largest of 2 x 2 outputs is a pixel, and a tile has two rows of two.
    """

    arguments = (
        "x", "x_plane", "x_channel", "y", "y_row", "y_channel", "residual", "residual_row",
        "residual_channel", "bias", "masks", "rows", "bounds", "channels",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg = self.builder, self.arg
        zero = ir.Constant(self.vector, None)
        end = ending(self, self.vector)
        size = OUTPUTS // self.kernel.rows
        has_residual = b.icmp_unsigned("!=", arg["residual"], I64(0))
        masks = [self.mask(self.step(arg["masks"], i * self.bit_bytes)) for i in range(2 * size)]

        def channel(x: ir.Value, y_start: ir.Value, residual: ir.Value, bias: ir.Value) -> None:
            at, planes = x, []
            for _ in range(PLANES * PLANES):
                planes.append(self.load(self.vector, at))
                at = b.add(at, arg["x_plane"])
            down = [self.into_outputs(planes[j::PLANES]) for j in range(PLANES)]
            rows = [self.into_outputs(list(row)) for row in zip(*down, strict=True)]
            for i, row in enumerate(self._pooled(rows) if size < OUTPUTS else rows):
                pixels = self.together([b.fadd(value, bias) for value in row])
                for q, (group, pixel) in enumerate(self.chunks(size)):
                    place = I64(group * size + i)
                    with b.if_then(b.icmp_signed(">", arg["rows"], place)):
                        beside = b.add(residual, b.mul(place, arg["residual_row"]))
                        beside = self.step(beside, pixel * FLOAT_BYTES)
                        whole = self.plus(pixels[q], beside, has_residual)
                        value = b.select(masks[q], end(whole), zero)
                        to = b.add(y_start, b.mul(place, arg["y_row"]))
                        to = self.step(to, pixel * FLOAT_BYTES)
                        self.store_first(value, to, masks[size + q])

        self.each_output(channel)

    def _pooled(self, rows: list[list[ir.Value]]) -> list[list[ir.Value]]:
        """Take the largest of every 2 x 2 values."""
        return [
            [self.largest([*upper[i : i + 2], *lower[i : i + 2]]) for i in range(0, len(upper), 2)]
            for upper, lower in zip(rows[::2], rows[1::2], strict=True)
        ]

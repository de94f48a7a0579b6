"""Winograd's transforms in both directions: tiles of 6 x 6 pixels to 36 planes, and back to 4 x 4.

A vector holds one pixel of each of as many tiles as it has lanes. The tiles of a *unit*, one
vector, lie side by side in one tile row, or, where an image is narrow, in two or four rows, so that
its lanes are used. Pixels come and go as whole vectors along rows: four of them are shuffled into
the four columns of the tiles.
"""

# L lanes; G tile rows of a unit (kernel.columns), each L / G tiles wide

from __future__ import annotations

from llvmlite import ir

from .transforms import Transform
from .winograd_matrices import OUTPUTS, PLANES
from .writer import FLOAT_BYTES, I64


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
        zero = ir.Constant(self.vector, None)
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
            columns: list[list[ir.Value]] = []  # [row][column]
            for i in range(PLANES):
                found = []
                for shift in (0, OUTPUTS):
                    vectors = []
                    for q, (group, pixel) in enumerate(self.chunks(OUTPUTS)):
                        at = self.step(rows[group * PLANES + i], (pixel + shift) * FLOAT_BYTES)
                        mask = masks[q + (OUTPUTS if shift else 0)]
                        vectors.append(b.select(mask, self.load(self.vector, at), zero))
                    found += self.apart(vectors)[: PLANES - shift]
                columns.append(found)
            # down the columns, then along the rows
            down = [self.into_planes(list(column)) for column in zip(*columns, strict=True)]
            for row in zip(*down, strict=True):
                for plane in self.into_planes(list(row)):
                    self.store(plane, y)
                    y = b.add(y, arg["y_plane"])
            following = [b.add(row, stride) for row, stride in zip(rows, strides, strict=True)]
            return [b.add(state[0], arg["y_channel"]), *following]

        self.loop([arg["y"], *starts], channel, arg["channels"])
        b.ret_void()


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
                        value = b.select(masks[q], self.clamp(whole), zero)
                        to = b.add(y_start, b.mul(place, arg["y_row"]))
                        to = self.step(to, pixel * FLOAT_BYTES)
                        self.store_first(value, to, masks[size + q])

        self.each_output(channel)

    def _pooled(self, rows: list[list[ir.Value]]) -> list[list[ir.Value]]:
        """Take the largest of every 2 x 2 values."""
        down = [
            [self.larger(a, b) for a, b in zip(*pair, strict=True)]
            for pair in zip(rows[::2], rows[1::2], strict=True)
        ]
        return [
            [self.larger(a, b) for a, b in zip(row[::2], row[1::2], strict=True)] for row in down
        ]

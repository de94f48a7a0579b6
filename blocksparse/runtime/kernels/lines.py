"""Winograd's transforms along the rows: a line of pixels to planes, planes to a line of outputs.

A channel is one long line of pixels, padding included, and is cut into tiles of m pixels wherever
their rows end: an output is the sum of the inputs beside it on the line. A vector holds one pixel,
or one plane, of as many tiles as it has lanes, a *unit*: m vectors of pixels.
"""

# F(m, r), r = kernel.width: n = m + r - 1 pixels and planes of a tile, m outputs

from __future__ import annotations

from llvmlite import ir

from .activations import ending
from .transforms import Transform
from .writer import FLOAT_BYTES, I64


class LineInput(Transform):
    """Pixels of all channels to the planes of so many units."""

    arguments = ("x", "x_channel", "y", "y_plane", "y_channel", "channels", "count")

    def write(self) -> None:
        """Write the function."""
        b, arg, filtering = self.builder, self.arg, self.filtering
        size, width = self.lanes * FLOAT_BYTES, filtering.outputs

        def channel(state: list[ir.Value]) -> list[ir.Value]:
            def unit(state: list[ir.Value]) -> list[ir.Value]:
                x, to = state
                pixels: list[ir.Value] = []  # by their place in the tile
                for first in range(0, filtering.planes, width):
                    at = self.step(x, first * FLOAT_BYTES)
                    vectors = [
                        self.load(self.vector, self.step(at, i * size)) for i in range(width)
                    ]
                    pixels += self.apart(vectors)
                following = self.step(to, size)
                for plane in self.into_planes(pixels[: filtering.planes]):
                    self.store(plane, to)
                    to = b.add(to, arg["y_plane"])
                return [self.step(x, width * size), following]

            self.loop(list(state), unit)
            return [b.add(state[0], arg["x_channel"]), b.add(state[1], arg["y_channel"])]

        self.loop([arg["x"], arg["y"]], channel, arg["channels"])
        b.ret_void()


class LineOutput(Transform):
    """Planes of so many units to the pixels of some output channels, through the epilogue.

    The masks are those of the pixels inside the image, of vector after vector; ``vectors`` are left
    from the first on, and none behind them is written.
    """

    arguments = (
        "x", "x_plane", "x_channel", "y", "y_channel", "residual", "residual_channel", "bias",
        "masks", "vectors", "bounds", "channels", "count",
    )  # fmt: skip

    def write(self) -> None:
        """Write the function."""
        b, arg, filtering = self.builder, self.arg, self.filtering
        size, width = self.lanes * FLOAT_BYTES, filtering.outputs
        has_residual = b.icmp_unsigned("!=", arg["residual"], I64(0))
        zero = ir.Constant(self.vector, None)
        end = ending(self, self.vector)

        def channel(
            x_start: ir.Value, y_start: ir.Value, residual: ir.Value, bias: ir.Value
        ) -> None:
            def unit(state: list[ir.Value]) -> list[ir.Value]:
                x, y, beside, bits, left = state
                at, planes = x, []
                for _ in range(filtering.planes):
                    planes.append(self.load(self.vector, at))
                    at = b.add(at, arg["x_plane"])
                pixels = self.together([b.fadd(v, bias) for v in self.into_outputs(planes)])
                for i, value in enumerate(pixels):
                    with b.if_then(b.icmp_signed(">", left, I64(i))):
                        whole = self.plus(value, self.step(beside, i * size), has_residual)
                        inside = self.mask(self.step(bits, i * self.bit_bytes))
                        ended = b.select(inside, end(whole), zero)
                        self.store(ended, self.step(y, i * size))
                return [
                    self.step(x, size),
                    self.step(y, width * size),
                    self.step(beside, width * size),
                    self.step(bits, width * self.bit_bytes),
                    b.sub(left, I64(width)),
                ]

            self.loop([x_start, y_start, residual, arg["masks"], arg["vectors"]], unit)

        self.each_output(channel)

"""Where the values of a graph lie in memory: padded planes, pixels innermost.

A feature map is stored as ``[C][N][rows][row]``: every channel is one long line of pixels, all
images one behind the other. A row is a little longer than the image is wide; the columns behind its
end are zero and serve as the right padding of one row and the left padding of the next. Rows
between images work the same way. A convolution of stride 1 then reads kernel position (i, j) at a
fixed distance from the output pixel, and any run of pixels can be computed at once, whatever rows
and images it crosses.

For that, the input and the output of such a convolution must agree on row length and channel
stride, and so must the two sides of a sum, the parts of a concatenation, and a value and channels
that are taken of it. Values that must agree form a *frame*; `frames` finds them.
"""

# N images, C channels, H W image, F features; a frame has R rows an image of L pixels each

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blocksparse.format import Graph, Node

from .kernels.records import Layout
from .kernels.winograd_matrices import ALONG

Ints = npt.NDArray[np.integer]

PAGE_BYTES = 4096
"""What the operating system maps at once, and the processor's prefetcher does not leave."""

ALIGN = 16
"""Strides and bases are multiples of this many floats: one cache line, the longest vector."""

LINE_TILE = max(filtering.outputs for filtering in ALONG.values())
"""Pixels of a tile of Winograd's transforms along the rows: the last may begin with the last pixel
and reads what its other outputs need."""


@dataclass(frozen=True)
class Frame:
    """The common geometry of values that must agree, for any batch.

    Parameters
    ----------
    rows, row : int
        Rows of an image and pixels of a row, padding included.
    above, left : int
        Largest padding, in rows and columns, that a reader of one of the values asks for.
    beyond : int
        Pixels behind that padding that a reader of one of the values may read besides.
    """

    rows: int
    row: int
    above: int
    left: int
    beyond: int = 0

    @property
    def image(self) -> int:
        """Floats from one image to the next."""
        return self.rows * self.row

    @property
    def margin(self) -> int:
        """Floats before the first and after the last pixel of a channel that have to be zero."""
        return self.above * self.row + self.left + self.beyond

    @property
    def lead(self) -> int:
        """Floats kept before the first pixel of a channel: the margin, aligned."""
        return round_up(self.margin, ALIGN)

    def channel(self, batch: int) -> int:
        """Floats from one channel to the next at a batch size."""
        stride = self.lead + round_up(batch * self.image, ALIGN) + round_up(self.margin, ALIGN)
        return odd_lines(stride)


def round_up(count: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-count // multiple) * multiple


def odd_lines(count: int) -> int:
    """Round floats up to an odd number of cache lines, so that channels fall into all sets."""
    count = round_up(count, ALIGN)
    return count if count // ALIGN % 2 else count + ALIGN


def frames(
    graph: Graph, shapes: Mapping[str, tuple[int, ...]], lines: Collection[str] = ()
) -> dict[str, Frame]:
    """Find the frame of every feature map of a graph.

    Parameters
    ----------
    graph : Graph
        The graph.
    shapes : mapping of str to tuple of int
        Shape of every value that will lie in memory, phase planes of strided convolutions included.
    lines : collection of str
        Convolutions that may run along the rows, see `kernels.lines`.

    Returns
    -------
    dict
        Frame by value name; vectors have none.
    """
    groups = _Groups()
    shapes = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    need: dict[str, tuple[int, int]] = {}  # padding by value
    beyond: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "conv2d":
            source = node.inputs[0]
            if is_strided(node):
                source = phases_name(node)  # its planes hold the padding
            else:
                above, left = need.get(source, (0, 0))
                need[source] = (
                    max(above, node.attrs["padding"][0]),
                    max(left, node.attrs["padding"][1]),
                )
                if node.name in lines:
                    beyond[source] = LINE_TILE - 1
            for name in (source, *node.inputs[1:]):
                groups.join(node.name, name)
        elif node.op in ("add", "concat", "activation", "affine", "mul"):
            for name in node.inputs:
                if shapes.get(name, ())[1:] == node.shape[1:]:
                    groups.join(node.name, name)
        elif is_part(node, shapes):
            groups.join(node.name, node.inputs[0])
    members: dict[str, list[str]] = {}
    for name in shapes:
        members.setdefault(groups.root(name), []).append(name)
    result = {}
    for names in members.values():
        above = max(need.get(name, (0, 0))[0] for name in names)
        left = max(need.get(name, (0, 0))[1] for name in names)
        rows = max(shapes[name][1] + need.get(name, (0, 0))[0] for name in names)
        row = max(shapes[name][2] + need.get(name, (0, 0))[1] for name in names)
        most = max(beyond.get(name, 0) for name in names)
        result.update(dict.fromkeys(names, Frame(rows, row, above, left, most)))
    return result


def is_part(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a node takes neighbouring channels of a feature map, with all their pixels."""
    if node.op != "slice" or tuple(node.attrs["step"]) != (1, 1, 1):
        return False
    return node.shape[1:] == shapes[node.inputs[0]][1:]


def is_strided(node: Node) -> bool:
    """Whether a convolution reads phase planes instead of its input."""
    return tuple(node.attrs["stride"]) != (1, 1)


def phases_name(node: Node) -> str:
    """Name of the phase planes that a strided convolution reads."""
    return f"{node.name}.phases"


def is_phases(name: str, node: Node) -> bool:
    """Whether a value is the phase planes of a convolution."""
    return node.op == "conv2d" and is_strided(node) and name == phases_name(node)


def phases(node: Node, kernel: tuple[int, int]) -> list[tuple[int, int]]:
    """Row and column phases that a strided convolution reads, in the order of its planes."""
    rows, columns = (
        sorted({i * d % s for i in range(k)})
        for k, d, s in zip(kernel, node.attrs["dilation"], node.attrs["stride"], strict=True)
    )
    return [(a, b) for a in rows for b in columns]


def phases_shape(
    node: Node, kernel: tuple[int, int], shape: tuple[int, ...]
) -> tuple[int, int, int]:
    """Shape (channels * phases, H, W) of the phase planes of a padded input of `shape`."""
    height, width = (
        -(-(size + 2 * pad) // stride)
        for size, pad, stride in zip(
            shape[1:], node.attrs["padding"], node.attrs["stride"], strict=True
        )
    )
    return shape[0] * len(phases(node, kernel)), height, width


def taps(
    node: Node, kernel: tuple[int, int], channels: Ints, positions: Ints
) -> tuple[Ints, Ints, Ints]:
    """Find what kernel steps read: the input itself at stride 1, else its phase planes.

    Parameters
    ----------
    node : Node
        The convolution.
    kernel : tuple of int
        Kernel height and width.
    channels, positions : ndarray of int
        Input channel and kernel position of every step.

    Returns
    -------
    channel, row, column : ndarray of int64
        Channel that is read, phase planes counted one by one; distance from the output pixel
        without the padding, dilation included.
    """
    row, column = np.divmod(positions.astype(np.int64), kernel[1])
    row, column = row * node.attrs["dilation"][0], column * node.attrs["dilation"][1]
    channel = channels.astype(np.int64)
    if not is_strided(node):
        return channel, row, column
    order = phases(node, kernel)
    (row, a), (column, b) = (
        np.divmod(place, stride)
        for place, stride in zip((row, column), node.attrs["stride"], strict=True)
    )
    plane = np.zeros(node.attrs["stride"], np.int64)
    for place, phase in enumerate(order):
        plane[phase] = place
    return channel * len(order) + plane[a, b], row, column


def place(shape: tuple[int, ...], frame: Frame | None, base: int, batch: int) -> Layout:
    """Lay out one value.

    Parameters
    ----------
    shape : tuple of int
        (C, H, W), or (F,) for a vector.
    frame : Frame or None
        The frame of a feature map; None for a vector, which lies as ``[N][F]``.
    base : int
        Place of its first float in memory, lead included.
    batch : int
        Images.
    """
    if frame is None:
        return Layout(base, 1, round_up(shape[0], ALIGN), 1, shape[0], 1, 1, -1)
    channels, height, width = shape
    return Layout(
        base + frame.lead, frame.channel(batch), frame.image, frame.row, channels, height, width,
        frame.margin
    )  # fmt: skip


def size(shape: tuple[int, ...], frame: Frame | None, batch: int) -> int:
    """Floats that a value takes."""
    if frame is None:
        return round_up(shape[0], ALIGN) * batch
    return shape[0] * frame.channel(batch)


def contiguous(shape: tuple[int, ...]) -> Layout:
    """Lay out a NumPy array of shape (N, *shape), C order."""
    channels, height, width = shape if len(shape) == 3 else (shape[0], 1, 1)
    plane = height * width
    return Layout(0, plane, channels * plane, width, channels, height, width, -1)


class _Groups:
    """Disjoint sets of value names."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        while (parent := self.parent.get(name, name)) != name:
            name = parent
        return name

    def join(self, a: str, b: str) -> None:
        self.parent[self.root(a)] = self.root(b)

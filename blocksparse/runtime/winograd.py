"""Weights for Winograd's F(m, r): planes in place of taps, by columns, by rows, or both.

With masks shared over kernel positions the planes keep the pattern of the weight, and a tile row
costs 6 * kw products a block in place of 4 * 3 * kw, say. A mask of its own per position costs
more: a plane needs every block that one of the taps has.
"""

# S kernel steps of a row tile, J columns of a step, R rows of a tile, P planes

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from blocksparse.format import Graph, Node

from . import layout
from .kernels.target import Target
from .kernels.winograd_matrices import ALONG, FILTERINGS, OUTPUTS
from .prepack import Packed, RowTile

TRANSFORM_COST = 40 / 36
"""What the two transforms cost for one vector of a tile row and one channel, in FMAs of a vector,
over the entries of a matrix, n * n.

Measured on ResNet-50's layers, where n is 6: input 25 to 40, output 30 to 50.
"""

CLAMPS = ("none", "relu", "relu6")
"""Activations that are bounds, which any product takes; convolutions have kernels for others."""

GROUP = 8
"""Least outputs of a group that transforms of its inputs serve."""

TILE = 3
"""Kernel height and width of what goes through tiles in both directions."""


@dataclass(frozen=True)
class Geometry:
    """A convolution, whatever the batch.

    Parameters
    ----------
    kernel : tuple of int
        Kernel height, one of `FILTERINGS`, and width.
    height : int
        Rows of an output image.
    row : int
        Pixels from one row to the next, padding included.
    """

    kernel: tuple[int, int]
    height: int
    row: int

    @property
    def tile_rows(self) -> int:
        """Tile rows of an image."""
        return -(-self.height // FILTERINGS[self.kernel[0]].outputs)


def read_kernel(node: Node, kernel: tuple[int, int]) -> tuple[int, int]:
    """Kernel height and width on what a convolution reads: at stride 2, 4x4 of each phase for 7x7.

    Phases with fewer taps than others are counted as if they had as many.
    """
    (height, width), (down, along) = kernel, node.attrs["stride"]
    return -(-height // down), -(-width // along)


def fits_columns(node: Node, kernel: tuple[int, int]) -> bool:
    """Whether a convolution can go down the columns: height, groups, not dilated that way.

    One with a stride is one of stride 1 on its phase planes, unless it is dilated. All planes take
    the same points, so that the sums go over them as over other channels.
    """
    if read_kernel(node, kernel)[0] not in FILTERINGS or not _wide_groups(node):
        return False
    if not layout.is_strided(node):
        return bool(node.attrs["dilation"][0] == 1)
    return tuple(node.attrs["dilation"]) == (1, 1)


def fits_rows(node: Node, kernel: tuple[int, int]) -> bool:
    """Whether a convolution can go along the rows: width, height 1, stride 1, groups."""
    return kernel[0] == 1 and kernel[1] in ALONG and _plain(node, 1)


def fits_tiles(node: Node, kernel: tuple[int, int]) -> bool:
    """Whether a convolution can go through tiles in both directions: as both, and 3 x 3."""
    return kernel == (TILE, TILE) and _plain(node, 0) and _plain(node, 1)


def _plain(node: Node, axis: int) -> bool:
    return not layout.is_strided(node) and node.attrs["dilation"][axis] == 1 and _wide_groups(node)


def _wide_groups(node: Node) -> bool:
    """Whether all channels are one group, or each has outputs for a tile; depthwise ones have not.

    RegNetY 800MF, with groups of 16 channels, takes 0.96 of the time so at 75 %, on one thread.
    """
    return node.attrs["groups"] == 1 or bool(node.shape[0] // node.attrs["groups"] >= GROUP)


def unit_rows(height: int, width: int, lanes: int) -> int:
    """Tile rows that a unit of tiles covers: as many as fit side by side into one vector.

    Parameters
    ----------
    height, width : int
        Of the output image.
    lanes : int
        Floats of a vector.
    """
    down, across = -(-height // OUTPUTS), -(-width // OUTPUTS)
    return next(g for g in (4, 2, 1) if g == 1 or (g <= down and across <= lanes // g))


def pool_after(graph: Graph, node: Node, lanes: int) -> Node | None:
    """Return the max pool that tiles of a convolution can take in, if there is one.

    It has to be the only reader, with windows of 2 x 2 that neither overlap nor are padded: a tile
    holds four of them. A convolution with a residual, or with an activation that is no clamp, is
    not finished when its tiles are. Where a unit covers four tile rows, a row of pooled pixels is
    half a vector, which nobody stores.
    """
    readers = [other for other in graph.nodes if node.name in other.inputs]
    if len(node.inputs) > 1 or node.attrs["activation"] not in CLAMPS:
        return None
    if node.name in graph.outputs or [reader.op for reader in readers] != ["max_pool2d"]:
        return None
    pool, (_, height, width) = readers[0], node.shape
    plain = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}
    if any(tuple(pool.attrs[name]) != value for name, value in plain.items()):
        return None
    whole = tuple(pool.shape[1:]) == (height // 2, width // 2)  # no window beyond the image
    return pool if whole and unit_rows(height, width, lanes) <= OUTPUTS // 2 else None


def holds_padding(node: Node, target: Target) -> bool:
    """Whether a vector holds the left padding, as columns and tiles want it."""
    return bool(node.attrs["padding"][1] <= target.lanes)


def on_phases(
    packed: Packed, node: Node, kernel: tuple[int, int]
) -> tuple[Packed, tuple[int, int]]:
    """Turn a prepared weight into one of stride 1 on what is read; return it and its kernel size.

    The size is that of `read_kernel`.
    """
    size = read_kernel(node, kernel)
    if not layout.is_strided(node):
        return packed, size
    channel, row, column = layout.taps(node, kernel, packed.channels, packed.positions)
    position = row * size[1] + column
    on_planes = replace(
        packed, channels=channel.astype(np.int32), positions=position.astype(np.int32)
    )
    return on_planes, size


def columns(packed: Packed, kernel: tuple[int, int]) -> Packed:
    """Turn a prepared weight into planes that stand for its rows of taps.

    Parameters
    ----------
    packed : Packed
        Of stride 1: as `prepack.pack` or `on_phases` returns it; not N:M.
    kernel : tuple of int
        Kernel height and width.

    Returns
    -------
    Packed
        A tile's values are plane after plane, ``[P][S][J][R]``; positions are kernel columns. The
        sums are taken in float64 and rounded once.
    """
    return _transformed(packed, np.array(FILTERINGS[kernel[0]].weight), kernel[1])


def rows(packed: Packed, kernel: tuple[int, int]) -> Packed:
    """Turn a prepared weight of height 1 into planes; as `columns`, but no position is left."""
    return _transformed(packed, np.array(FILTERINGS[kernel[1]].weight), 1)


def tiles(packed: Packed, kernel: tuple[int, int]) -> Packed:
    """Turn a prepared weight of 3 x 3 into 36 planes; as `columns`, but no position is left."""
    down, along = (np.array(FILTERINGS[size].weight) for size in kernel)
    return _transformed(packed, np.kron(down, along), 1)


def _transformed(packed: Packed, matrix: npt.NDArray[np.float64], width: int) -> Packed:
    """Multiply the taps by a matrix (P, taps); of positions, the remainder by `width` is left."""
    size = packed.columns * packed.rows
    values, channels, columns, tiles = [], [], [], []
    place = steps = 0
    done: dict[tuple[int, int], tuple[slice, np.ndarray, np.ndarray]] = {}
    for tile in packed.tiles:
        count = tile.steps.stop - tile.steps.start
        key = (tile.steps.start, tile.steps.stop)
        if key not in done:  # the tiles of a dense weight share their steps
            tap, column = np.divmod(packed.positions[tile.steps].astype(np.int64), width)
            kinds, inverse = np.unique(
                packed.channels[tile.steps].astype(np.int64) * width + column, return_inverse=True
            )
            channels.append(kinds // width)
            columns.append(kinds % width)
            done[key] = slice(steps, steps + len(kinds)), inverse, tap
            steps += len(kinds)
        where, inverse, tap = done[key]
        taps = np.zeros((matrix.shape[1], where.stop - where.start, size))
        stored = packed.values[tile.values : tile.values + count * size]
        taps[tap, inverse] = stored.reshape(count, size)
        planes = (matrix @ taps.reshape(matrix.shape[1], -1)).astype(np.float32).reshape(-1)
        tiles.append(RowTile(tile.first, tile.rows, place, where))
        values.append(planes)
        place += len(planes)
    return Packed(
        packed.rows, packed.columns, 0, _joined(values, np.float32), _joined(channels, np.int32),
        _joined(columns, np.int32), packed.indices, tuple(tiles),
    )  # fmt: skip


def pays(packed: Packed, channels: int, geometry: Geometry, lanes: int) -> bool:
    """Whether columns are expected to run faster than the weight itself: a rule of thumb.

    Parameters
    ----------
    packed : Packed
        The weight as it is, of stride 1; see `on_phases`.
    channels : int
        Input channels.
    geometry : Geometry
        Of that convolution.
    lanes : int
        Floats of a vector.
    """
    size, width = packed.columns * packed.rows, geometry.kernel[1]
    kinds: dict[tuple[int, int], int] = {}
    for tile in packed.tiles:
        key = (tile.steps.start, tile.steps.stop)
        if key not in kinds:
            column = packed.positions[tile.steps] % width
            kinds[key] = len(
                np.unique(packed.channels[tile.steps].astype(np.int64) * width + column)
            )
    direct = size * sum(tile.steps.stop - tile.steps.start for tile in packed.tiles)
    direct *= -(-geometry.height * geometry.row // lanes)
    rows = geometry.tile_rows
    planes = FILTERINGS[geometry.kernel[0]].planes
    products = planes * size
    products *= sum(kinds[tile.steps.start, tile.steps.stop] for tile in packed.tiles)
    products *= -(-rows * geometry.row // lanes)
    outputs = sum(tile.rows for tile in packed.tiles)
    vectors = rows * -(-geometry.row // lanes)
    return products + TRANSFORM_COST * planes**2 * vectors * (channels + outputs) < direct


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)

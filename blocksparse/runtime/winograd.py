"""Weights for Winograd's F(4, 3): six planes in place of three rows of taps.

With masks shared over kernel positions the planes keep the pattern of the weight, and a tile row
costs 6 * kw products a block in place of 4 * 3 * kw. A mask of its own per position costs more: a
plane needs every block that one of the three rows has.
"""

# S kernel steps of a row tile, J columns of a step, R rows of a tile, P planes

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blocksparse.format import Node

from . import layout
from .kernels.target import Target
from .kernels.winograd_matrices import OUTPUTS, PLANES, TAPS, WEIGHT
from .prepack import Packed, RowTile

TRANSFORM_COST = 40
"""What the two transforms cost for one vector of a tile row and one channel, in FMAs of a vector.

Measured on ResNet-50's layers: input 25 to 40, output 30 to 50.
"""


@dataclass(frozen=True)
class Geometry:
    """Tile rows of one convolution, whatever the batch.

    Parameters
    ----------
    height : int
        Rows of an output image.
    row : int
        Pixels from one row to the next, padding included.
    """

    height: int
    row: int

    @property
    def tile_rows(self) -> int:
        """Tile rows of an image."""
        return -(-self.height // OUTPUTS)


def applies(node: Node, kernel: tuple[int, int], target: Target) -> bool:
    """Whether a convolution can run this way: height 3, stride 1, undilated rows, one group.

    Parameters
    ----------
    node : Node
        A convolution.
    kernel : tuple of int
        Kernel height and width.
    target : Target
        Its vectors have to hold the left padding.
    """
    return (
        kernel[0] == TAPS
        and not layout.is_strided(node)
        and node.attrs["dilation"][0] == 1
        and node.attrs["groups"] == 1
        and node.attrs["padding"][1] <= target.lanes
    )


def applies_both(node: Node, kernel: tuple[int, int], target: Target) -> bool:
    """Whether a convolution can go through tiles in both directions: as `applies`, and 3 x 3."""
    return applies(node, kernel, target) and kernel[1] == TAPS and node.attrs["dilation"][1] == 1


def transform(packed: Packed, width: int, both: bool = False) -> Packed:
    """Turn a prepared weight of kernel height 3 into planes.

    Parameters
    ----------
    packed : Packed
        As `prepack.pack` returns it; not N:M.
    width : int
        Kernel width.
    both : bool
        Transform rows as well as columns, for a width of 3: P is 36 in place of 6, and nothing is
        left of the kernel columns.

    Returns
    -------
    Packed
        A tile's values are plane after plane, ``[P][S][J][R]``; positions are kernel columns. The
        sums are taken in float64 and rounded once.
    """
    matrix = np.kron(WEIGHT, WEIGHT) if both else np.array(WEIGHT)
    size = packed.columns * packed.rows
    values, channels, columns, tiles = [], [], [], []
    place = steps = 0
    done: dict[tuple[int, int], tuple[slice, np.ndarray, np.ndarray]] = {}
    for tile in packed.tiles:
        count = tile.steps.stop - tile.steps.start
        key = (tile.steps.start, tile.steps.stop)
        if key not in done:  # the tiles of a dense weight share their steps
            tap, column = np.divmod(
                packed.positions[tile.steps].astype(np.int64), 1 if both else width
            )
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


def pays(packed: Packed, width: int, channels: int, geometry: Geometry, lanes: int) -> bool:
    """Whether the planes are expected to run faster than the weight itself: a rule of thumb.

    Parameters
    ----------
    packed : Packed
        The weight before `transform`.
    width : int
        Kernel width.
    channels : int
        Input channels.
    geometry : Geometry
        Of the convolution.
    lanes : int
        Floats of a vector.
    """
    size = packed.columns * packed.rows
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
    products = PLANES * size
    products *= sum(kinds[tile.steps.start, tile.steps.stop] for tile in packed.tiles)
    products *= -(-rows * geometry.row // lanes)
    outputs = sum(tile.rows for tile in packed.tiles)
    vectors = rows * -(-geometry.row // lanes)
    return products + TRANSFORM_COST * vectors * (channels + outputs) < direct


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)

"""Weights as the micro-kernels read them: tiles of output channels, each a list of input columns.

Whatever the file holds (dense, BSR of any block shape, packed N:M) becomes the same thing here: row
tiles of at most `Target.rows` output channels, the values of a tile in the order the kernel reads
them, and for every step of the kernel the input channel and kernel position it starts from. A zero
block is nowhere stored, a dense weight stores every block.
"""

# K out-channels, C in-channels, P kernel positions, R rows of a tile, J columns of a step, S steps

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

from blocksparse.format import BsrWeight, DenseWeight, NMWeight, Weight

from .kernels.target import Target


@dataclass(frozen=True, eq=False)
class RowTile:
    """Output channels computed together.

    Parameters
    ----------
    first, rows : int
        First output channel and how many of the tile's rows exist.
    values : int
        Place of the tile's first value in `Packed.values`.
    steps : slice
        The tile's part of `Packed.channels` and `Packed.positions`.
    indices : int
        N:M only: place of the tile's first byte in `Packed.indices`.
    """

    first: int
    rows: int
    values: int
    steps: slice
    indices: int = 0


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight ready for the micro-kernels.

    Parameters
    ----------
    rows, columns : int
        Register tile rows R and columns J of a kernel step; for N:M 1 and n.
    group : int
        N:M group length m, else 0.
    values : ndarray of float32, 1-D
        Tile after tile, step after step, column after column, R rows each.
    channels, positions : ndarray of int32, 1-D
        Input channel (absolute) and kernel position where each step starts.
    indices : ndarray of uint8, 1-D
        N:M only: the packed bit fields, as in the file.
    tiles : tuple of RowTile
        The tiles, in the order of output channels.
    """

    rows: int
    columns: int
    group: int
    values: npt.NDArray[np.float32]
    channels: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    indices: npt.NDArray[np.uint8]
    tiles: tuple[RowTile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(a.nbytes for a in (self.values, self.channels, self.positions, self.indices))


_NO_INDICES = np.zeros(0, np.uint8)


def pack(weight: Weight, groups: int, target: Target) -> Packed:
    """Prepare a weight for the micro-kernels of a target.

    Parameters
    ----------
    weight : Weight
        As read from the file.
    groups : int
        Convolution groups; above 1 only with dense weights.
    target : Target
        Gives the largest tile.

    Returns
    -------
    Packed
        About as large as the weight in the file.
    """
    if isinstance(weight, NMWeight):
        return _pack_nm(weight)
    if isinstance(weight, BsrWeight):
        return _pack_bsr(weight, target)
    return _pack_dense(weight, groups, target)


def split_evenly(count: int, limit: int) -> int:
    """Size of the parts when `count` is cut into the fewest parts of at most `limit`."""
    return -(-count // -(-count // limit))


def _pack_dense(weight: DenseWeight, groups: int, target: Target) -> Packed:
    k, channels = weight.shape[:2]
    values = weight.values.reshape(groups, k // groups, channels, -1)
    rows = split_evenly(k // groups, target.rows)
    columns = next(j for j in range(min(8, channels), 0, -1) if channels % j == 0)
    per_group = -(-(k // groups) // rows)
    padded = np.zeros((groups, per_group * rows, *values.shape[2:]), np.float32)
    padded[:, : k // groups] = values
    positions = padded.shape[-1]
    # [group, tile, R, C/J, J, P] -> [group, tile, C/J, P, J, R]: all positions of a few channels
    # before the next few, so that the input lines they share are still in the first-level cache.
    tiled = padded.reshape(groups, per_group, rows, channels // columns, columns, positions)
    tiled = np.ascontiguousarray(tiled.transpose(0, 1, 3, 5, 4, 2))
    steps = channels // columns * positions
    within = np.repeat(np.arange(0, channels, columns), positions)
    tiles = []
    for group in range(groups):
        for tile in range(per_group):
            first = tile * rows
            tiles.append(
                RowTile(
                    first=group * (k // groups) + first,
                    rows=min(rows, k // groups - first),
                    values=(group * per_group + tile) * steps * columns * rows,
                    steps=slice(group * steps, (group + 1) * steps),
                )
            )
    return Packed(
        rows, columns, 0, tiled.reshape(-1),
        (np.arange(groups)[:, None] * channels + within).reshape(-1).astype(np.int32),
        np.tile(np.arange(positions), groups * channels // columns).astype(np.int32),
        _NO_INDICES, tuple(tiles),
    )  # fmt: skip


def _pack_bsr(weight: BsrWeight, target: Target) -> Packed:
    k, channels = weight.shape[:2]
    r, c = weight.block
    channel_blocks = -(-channels // c)
    rows = split_evenly(r, target.rows)
    parts = -(-r // rows)  # row tiles of one block row
    # A step must not read beyond the last input channel: cut blocks so that the ragged edge falls
    # between two steps.
    edge = channels % c
    unit = gcd(c, edge) if edge else c
    columns = next(j for j in range(min(8, unit), 0, -1) if unit % j == 0)
    cuts = c // columns

    order = np.empty(len(weight.indices), np.int64)
    for row in range(len(weight.indptr) - 1):
        span = slice(weight.indptr[row], weight.indptr[row + 1])
        position, block = np.divmod(weight.indices[span], channel_blocks)
        # all kernel positions of one channel block together: they share input lines
        order[span] = weight.indptr[row] + np.lexsort((position, block))
    position, block = np.divmod(weight.indices[order], channel_blocks)
    first = (block[:, None] * c + np.arange(cuts) * columns).reshape(-1)
    kept = first < channels
    blocks = np.zeros((len(order), parts * rows, c), np.float32)
    blocks[:, :r] = weight.data[order]
    # [B, part, R, cut, J] -> [part][B, cut][J, R]
    cut = blocks.reshape(-1, parts, rows, cuts, columns).transpose(1, 0, 3, 4, 2)
    steps_of = np.concatenate([[0], np.cumsum(kept.reshape(len(order), cuts).sum(axis=1))])
    starts = steps_of[weight.indptr]  # first step of each block row
    values = np.ascontiguousarray(cut).reshape(parts, -1, columns, rows)[:, kept]
    per_part = values[0].size if parts else 0
    tiles = []
    for row in range(len(weight.indptr) - 1):
        for part in range(parts):
            at = row * r + part * rows
            exist = min(rows, r - part * rows, k - at)
            if exist > 0:
                start, stop = int(starts[row]), int(starts[row + 1])
                tiles.append(
                    RowTile(at, exist, part * per_part + start * columns * rows, slice(start, stop))
                )
    return Packed(
        rows, columns, 0, values.reshape(-1), first[kept].astype(np.int32),
        np.repeat(position, cuts)[kept].astype(np.int32), _NO_INDICES, tuple(tiles),
    )  # fmt: skip


def _pack_nm(weight: NMWeight) -> Packed:
    k, positions, groups, n = weight.values.shape
    steps = slice(0, positions * groups)
    per_row = positions * groups * n
    tiles = tuple(
        RowTile(row, 1, row * per_row, steps, row * weight.indices.shape[1]) for row in range(k)
    )
    return Packed(
        1, n, weight.m, np.ascontiguousarray(weight.values).reshape(-1),
        np.tile(np.arange(groups) * weight.m, positions).astype(np.int32),
        np.repeat(np.arange(positions), groups).astype(np.int32),
        np.ascontiguousarray(weight.indices).reshape(-1), tiles,
    )  # fmt: skip

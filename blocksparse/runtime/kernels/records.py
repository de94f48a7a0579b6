"""The records of a program.

A program is an int64 table, one row per step. This module is the one place that knows what stands
in which column.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# What runs
LOAD, STORE, COPY, CONV, CONV_NM, LINEAR, LINEAR_NM, POOL, ADAPTIVE_POOL, ELEMENTWISE = range(10)
# Winograd down the columns, in both directions, and along the rows
WINOGRAD, TILES_CONV, LINES_CONV = 10, 11, 12

# Columns shared by all steps
OP, ITEMS = 0, 1
CHUNK = 2  # rows of all images, or channels, that one work item of a move covers
BY_CHANNELS = 31  # whether it is channels
SOURCE, TARGET = 33, 41  # each a `Layout`, 8 columns
OTHER = 49  # `Layout` of the residual or second operand; base -1: none
COMPUTE = 57  # address of the function that computes an item, see `loops`
JOINED = 59  # whether the next step runs at the same time
FIELDS = 60


class Layout(NamedTuple):
    """Where one value lies, at one batch size; distances in floats.

    Parameters
    ----------
    base : int
        Place of the first pixel of the first channel.
    channel, image, row : int
        Distance from one channel, image and row to the next.
    channels, height, width : int
        Shape of the value; a vector of F features has F channels of one pixel.
    margin : int
        Zeros needed on both sides of a channel's pixels; -1 where nothing around the pixels may be
        written.
    """

    base: int
    channel: int
    image: int
    row: int
    channels: int
    height: int
    width: int
    margin: int

    def run(self, batch: int) -> int:
        """Pixels of a channel from the first of the first image to the last of the last."""
        return (batch - 1) * self.image + (self.height - 1) * self.row + self.width


def layout_at(record: npt.NDArray[np.int64], at: int) -> Layout:
    """Read the layout that starts at a column of a record."""
    return Layout(*record[at : at + len(Layout._fields)].tolist())


# Copies: input coordinate = output coordinate * scale + shift; PLANES > 1 for phase planes
SCALE, SHIFT = 3, 6  # channel, row, column each
PLANES, PLANE_SHIFTS = 9, 10  # PLANE_SHIFTS: place of (row, column) shifts in the tables

# Copies and pools whose input is in halves, OTHER the lower one; 0: it is not
SPLIT = 22  # first row of outputs that reads the lower half
LOWER_TOP = 23  # row 0 of the outputs would begin so many rows above that half

# Convolutions and linear layers
KERNELS = 3  # addresses, by width 1, 2, 3 (CONV), 1, 2, 4, 8 (DOUBLING), 1, 2, 4 (LINEAR)
VECTORS, PANEL = 7, 8  # vectors of a channel, and of one panel
TILES, PARTS = 9, 10  # place of the row tiles and of the part boundaries in the tables
PARTS_COUNT = 11
TAIL = 12  # CONV: address of the kernel for the pixels behind the vectors; 0: there are none
BIAS, BOUNDS, MASK, LANES = 13, 14, 15, 16
WIDEST = 31  # vectors of the largest register tile
DOUBLING = 8  # with this one as the widest there are tiles of 1, 2, 4 and 8: CONV_NM, single rows

# Winograd convolutions, besides KERNELS, LANES, TILES, PARTS, BIAS and BOUNDS; distances in floats
TILE_ROWS_ALL, BAND, TILE_ROWS_IMAGE = 7, 8, 12  # tile rows: of the batch, of a band, of an image
INPUT_KERNEL, OUTPUT_KERNEL = 17, 18
INSIDE, WITHIN, ZEROS = 19, 20, 21  # addresses: pixels of an image row, all of it, a row of zeros
PAD_TOP = 22
PLANE, PLANE_CHANNEL = 23, 24  # from one plane of transformed input, and its channels, to the next
SUMS_PLANE, SUMS_ROW = 25, 26  # the same for the products of one row tile
STEP_BYTES = 27  # weights of one kernel step
# down the columns and along the rows: outputs of a tile, down or along, and planes
OUTPUTS, PLANES_ALL = 28, 29
BLOCK_CHANNEL = 32  # from one input channel of a block of weights to the next
# down the columns
LEAD = 30  # floats of a line before the band's first row, zeros, if any
# along the rows, where a tile row is a unit: one vector of tiles
PAD_LEFT = 30  # floats from the first input of the first output to the place of that output
# in tiles, where a tile row is a unit, too, and PAD_LEFT is a number of columns
GROUPS, UNITS_ROW = 28, 29  # tile rows of a unit, units along a row
WINDOW = 58  # rows and columns of outputs of which the largest is written: 1 or 2
TOGETHER = 32  # row tiles that go through the planes together

HEADER = 64
"""Bytes at the start of the scratch memory: which band of which step its planes hold."""

UNITS = 2
"""Units computed at once: their sums, 36 planes of a row tile, have to stay in the first cache."""

# One or several row tiles with the same steps, in the tables; TILE_NEXT: bytes from the weights of
# one to those of the next
TILE_FIRST, TILE_ROWS, TILE_VALUES, TILE_OFFSETS, TILE_COUNT, TILE_INDICES, TILE_NEXT = range(7)
TILE_FIELDS = 7

# Pools
KIND, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, COUNT_PAD = (
    range(3, 13)
)
MAX_POOL, AVG_POOL = 0, 1

# What a pool or copy with a micro-kernel of its own needs besides; 0: it has none
FAST, COLUMN_MASKS, DIVISORS, ROW_VECTORS = 13, 14, 15, 17  # WITHIN, LANES: as above

# Elementwise, besides KERNELS (one), MASK, WITHIN, and VECTORS, those of a run
SCALES, SHIFTS = 4, 5  # addresses
RUNS = 6  # one of all images, or as many as there are images

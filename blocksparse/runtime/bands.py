"""Records of convolutions through Winograd's transforms: bands of tiles, scratch memory."""

# S kernel steps, K out-channels

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import layout
from .caches import second_level
from .kernels import records
from .kernels.kernel import Kernel
from .kernels.winograd_matrices import FILTERINGS, OUTPUTS, PLANES, Filtering
from .prepack import Packed
from .products import HALVES, ITEMS, Product, fill_product, lane_bits, pixel_mask, shares_pixels
from .winograd import read_kernel, unit_rows

BAND_BYTES = second_level() * 3 // 8
"""Planes of one band: weights, sums and outputs pass by them in the second-level cache.

VGG-16, dense, with 2 MiB a core: 64.2 ms with 400 KiB, 62.8 with 768, 65.6 with 1536.
"""

PLANES_BYTES = second_level()
"""Where the planes of a band take more, `TOGETHER` row tiles go through them plane by plane.

So the inputs of a plane are read from the first-level cache by all but the first of them. A layer
of VGG-16 at 75 %, 512 channels of 28x28, takes 4.9 ms so and 6.1 otherwise on one core of a Zen 3,
2.4 and 3.3 on two.
"""

TOGETHER = 16
"""Row tiles that go through planes together: 8 and 32 are slower (5.1 and 5.7 ms)."""

FULL_ROWS = 8
"""Rows of a register tile that keep the multiply-adds busy at one vector.

With fewer, each waits for the one before it: so bands hold `records.UNITS` units, where so many
are left, which a tile takes together. With the four rows of AVX2, one core of a Zen 3: 256
channels of 14x14, dense, take 1.10 ms so and 1.91 with bands of one unit; 512 of 28x28, 16.0 and
26.4.
"""


def cut(units: int, unit_bytes: int, in_halves: bool, least: int = 1) -> tuple[int, int]:
    """Cut tile rows, or units of tiles, into bands.

    Parameters
    ----------
    units : int
        How many there are.
    unit_bytes : int
        Bytes of the planes of one.
    in_halves : bool
        Whether threads share bands: then their number is even, where it can be.
    least : int
        Units of a band, the last one aside, that larger planes do not keep apart.

    Returns
    -------
    band : int
        Units of a band.
    bands : int
        How many bands.
    """
    bands = -(-units // max(least, BAND_BYTES // unit_bytes))
    if in_halves or bands > 1:
        bands = min(layout.round_up(bands, HALVES), -(-units // least))
    band = -(-units // bands)
    return band, -(-units // band)


def _least(packed: Packed) -> int:
    """Units, or tile rows of narrow images, that a band should hold: enough for `FULL_ROWS`."""
    return records.UNITS if packed.rows < FULL_ROWS else 1


def fill_columns(product: Product) -> int:
    """Fill the record of a convolution through F(m, r) down the columns.

    Returns
    -------
    int
        Bytes of scratch memory that a thread needs.
    """
    record, packed, attrs = product.record, product.packed, product.step.node.attrs
    height, width = read_kernel(product.step.node, product.kernel)
    batch, output = product.batch, product.output
    lanes, row, channels = product.target.lanes, output.row, product.source.channels
    filtering = FILTERINGS[height]
    per_image = -(-output.height // filtering.outputs)
    in_halves = product.step.rows is None and shares_pixels(
        packed, channels, 4 * batch * per_image * filtering.outputs * row
    )
    unit_bytes = 4 * filtering.planes * channels * row
    band, bands = cut(batch * per_image, unit_bytes, in_halves, _least(packed))
    # the zeros left of the first row, the band, and what its last vector writes and reads beyond
    vectors = -(-band * row // lanes)
    dilation, left, phases = attrs["dilation"][1], attrs["padding"][1], 1
    if layout.is_strided(product.step.node):  # phase planes hold the padding
        phases, left = len(layout.phases(product.step.node, product.kernel)), 0
    lead = lanes if left else 0
    written = band * row + layout.round_up(row, lanes) - row
    reached = vectors * lanes + (width - 1) * dilation - left
    line = layout.odd_lines(lead + max(written, reached))
    record[records.LEAD] = lead
    record[records.TILE_ROWS_IMAGE] = per_image
    product.call(records.INPUT_KERNEL, Kernel("winograd_input", width=height))
    product.call(
        records.OUTPUT_KERNEL, Kernel("winograd_output", width=height, activation=product.ending)
    )
    columns = np.arange(layout.round_up(row, lanes))
    product.keep(records.INSIDE, lane_bits(columns < output.width, lanes))
    product.keep(records.WITHIN, lane_bits(columns < row, lanes))
    product.keep(records.ZEROS, np.zeros(len(columns), np.float32))
    offsets = packed.channels.astype(np.int64) * line - left + packed.positions * dilation
    _fill(product, offsets, bands)
    return _fill_planes(product, filtering, batch * per_image, band, vectors, line, phases)


def fill_lines(product: Product) -> int:
    """Fill the record of a convolution through F(m, r) along the rows.

    Returns
    -------
    int
        Bytes of scratch memory that a thread needs.
    """
    packed, output, width = product.packed, product.output, product.kernel[1]
    lanes, channels = product.target.lanes, product.source.channels
    filtering, run = FILTERINGS[width], output.run(product.batch)
    units = -(-run // (filtering.outputs * lanes))
    in_halves = product.step.rows is None and shares_pixels(packed, channels, 4 * run)
    unit_bytes = 4 * filtering.planes * channels * lanes
    band, bands = cut(units, unit_bytes, in_halves, _least(packed))
    line = layout.odd_lines(band * lanes)
    left = product.step.node.attrs["padding"][1]
    product.record[records.PAD_LEFT] = product.step.top * output.row + left
    product.call(records.INPUT_KERNEL, Kernel("line_input", width=width))
    product.call(
        records.OUTPUT_KERNEL, Kernel("line_output", width=width, activation=product.ending)
    )
    product.keep(records.INSIDE, pixel_mask(output, product.batch, lanes))
    _fill(product, packed.channels * np.int64(line), bands)
    return _fill_planes(product, filtering, units, band, band, line)


def fill_tiles(product: Product) -> int:
    """Fill the record of a convolution through F(4x4, 3x3).

    Returns
    -------
    int
        Bytes of scratch memory that a thread needs.
    """
    record, packed, step = product.record, product.packed, product.step
    source, output, batch = product.source, product.output, product.batch
    lanes, planes = product.target.lanes, PLANES * PLANES
    _, height, width = step.node.shape
    if step.rows is not None:
        height = step.rows.height
    across, down = -(-width // OUTPUTS), -(-height // OUTPUTS)
    groups = unit_rows(height, width, lanes)
    along = -(-across * groups // lanes)
    per_image = -(-down // groups) * along
    in_halves = step.rows is None and shares_pixels(
        packed, source.channels, 4 * batch * height * source.row
    )
    unit_bytes = 4 * planes * source.channels * lanes
    band, bands = cut(batch * per_image, unit_bytes, in_halves, _least(packed))
    line = layout.odd_lines(band * lanes)
    plane = layout.odd_lines(source.channels * line)
    record[records.TILE_ROWS_ALL] = batch * per_image
    record[records.BAND] = band
    record[records.TILE_ROWS_IMAGE] = per_image
    record[[records.GROUPS, records.UNITS_ROW]] = groups, along
    record[records.PAD_LEFT] = step.node.attrs["padding"][1]
    record[[records.PLANE, records.PLANE_CHANNEL]] = plane, line
    together = TOGETHER if 4 * planes * plane > PLANES_BYTES else 1
    record[records.TOGETHER] = together
    sums = records.UNITS * lanes
    record[[records.SUMS_PLANE, records.SUMS_ROW]] = packed.rows * sums, sums
    window = 2 if step.details["pools"] else 1
    record[records.WINDOW] = window
    taps = product.kernel[0]
    product.call(records.INPUT_KERNEL, Kernel("tile_input", 1, groups, taps))
    product.call(
        records.OUTPUT_KERNEL,
        Kernel("tile_output", window, groups, taps, activation=product.ending),
    )
    product.keep(records.ZEROS, np.zeros((along + 1) * OUTPUTS * lanes, np.float32))
    read = _unit_pixels(OUTPUTS, lanes, groups, along) - step.node.attrs["padding"][1]
    inside = [(at >= 0) & (at < source.width) for at in (read, read + OUTPUTS)]
    product.keep(records.INSIDE, lane_bits(np.concatenate(inside, axis=1), lanes))
    pixel = _unit_pixels(OUTPUTS // window, lanes, groups, along)
    written = [pixel < output.width, pixel < output.row]
    product.keep(records.WITHIN, lane_bits(np.concatenate(written, axis=1), lanes))
    _fill(product, packed.channels * np.int64(line), bands)
    return records.HEADER + 4 * planes * (plane + together * packed.rows * sums)


def _unit_pixels(width: int, lanes: int, groups: int, along: int) -> npt.NDArray[np.int64]:
    """Pixel of a row in each lane of the vectors of a unit, [unit][vector][lane].

    Tiles are `width` pixels wide, and a unit has as many vectors.
    """
    pixel = np.arange(width * lanes).reshape(width, lanes) % (width * lanes // groups)
    return pixel + np.arange(along)[:, None, None] * width * lanes


def _fill_planes(
    product: Product,
    filtering: Filtering,
    units: int,
    band: int,
    vectors: int,
    line: int,
    phases: int = 1,
) -> int:
    """Fill what the planes of a band take in one direction; return their bytes, sums included.

    Parameters
    ----------
    units, band : int
        Tile rows or units of all images, and of a band.
    vectors, line : int
        Vectors of a band that are computed, and floats from one channel of a plane to the next.
    phases : int
        Phase planes of an input channel, which count as channels of a plane.
    """
    record, rows, lanes = product.record, product.packed.rows, product.target.lanes
    plane = layout.odd_lines(product.source.channels * line)
    sums = layout.odd_lines(vectors * lanes + lanes)
    record[records.TILE_ROWS_ALL] = units
    record[records.BAND] = band
    record[[records.OUTPUTS, records.PLANES_ALL]] = filtering.outputs, filtering.planes
    record[[records.PLANE, records.PLANE_CHANNEL]] = plane, line
    record[records.BLOCK_CHANNEL] = line * phases
    record[[records.SUMS_PLANE, records.SUMS_ROW]] = rows * sums, sums
    return records.HEADER + 4 * filtering.planes * (plane + rows * sums)


def _fill(product: Product, offsets: npt.NDArray[np.int64], bands: int) -> None:
    """Fill what all three have in common."""
    record, packed = product.record, product.packed
    record[records.LANES] = product.target.lanes
    record[records.PAD_TOP] = product.step.top
    record[records.STEP_BYTES] = 4 * packed.rows * packed.columns
    parts = fill_product(product, offsets.astype(np.int32), -(-ITEMS // bands))
    record[records.ITEMS] = bands * parts

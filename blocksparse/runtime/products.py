"""Records of convolutions and linear layers: kernels, offsets, panels, parts."""

# S kernel steps, T row tiles, N images

from __future__ import annotations

from math import inf

import numpy as np
import numpy.typing as npt

from blocksparse.format import Node

from . import layout
from .kernels import objects, records
from .kernels.target import Target
from .kernels.winograd import HEADER
from .kernels.winograd_matrices import OUTPUTS, PLANES
from .kernels.winograd_tiles import WIDEST
from .kernels.writer import Kernel
from .layout import Layout
from .prepack import Packed
from .steps import Step
from .tables import Tables

PANEL_BYTES = 256 * 1024
"""Input of one panel of pixels: a quarter of a common second-level cache; weights pass by it."""

SPLIT = 1
LEAST = 2
ITEMS = 16
"""Work items that a large step is cut into: enough for a few threads to finish together."""

BAND_BYTES = 768 * 1024

BOUNDS = {"none": (-inf, inf), "relu": (0.0, inf), "relu6": (0.0, 6.0)}
"""The activations in `steps.CLAMPS`, as the bounds they clamp to."""

KERNELS: dict[int, tuple[str, tuple[int, ...]]] = {
    records.CONV: ("sparse_conv", (1, 2, 3)),
    records.CONV_NM: ("nm_conv", (1, 2, 4, 8)),
    records.WINOGRAD: ("sparse_product", (1, 2, 3)),
    records.TILES_CONV: ("sparse_product", (1, 2)),
    records.LINEAR: ("sparse_linear", (1, 2, 4)),
    records.LINEAR_NM: ("nm_linear", (1, 2, 4)),
}
"""Micro-kernel and its widths by step: vectors of pixels, or images for linear layers."""


def kernel_for(op: int, packed: Packed, width: int) -> Kernel:
    """Return the micro-kernel of a product at one width."""
    return Kernel(KERNELS[op][0], packed.rows, packed.columns, width, packed.group)


def fill_linear(
    record: npt.NDArray[np.int64],
    step: Step,
    packed: Packed,
    bias: npt.NDArray[np.float32],
    target: Target,
    tables: Tables,
) -> None:
    """Fill the record of a linear layer; its layouts are there already."""
    record[records.ITEMS] = _fill(
        record, step, packed, packed.channels, bias, target, tables, ITEMS
    )


def fill_conv(
    record: npt.NDArray[np.int64],
    step: Step,
    packed: Packed,
    bias: npt.NDArray[np.float32],
    target: Target,
    tables: Tables,
    source: Layout,
    output: Layout,
    kernel: tuple[int, int],
    batch: int,
) -> None:
    """Fill the record of a convolution, the layout of its input included."""
    planes = len(layout.phases(step.node, kernel)) if layout.is_strided(step.node) else 1
    offsets = conv_offsets(step.node, packed, source, kernel)
    # one channel's phase planes lie before the next channel
    record[records.SOURCE + 1] = source.channel * planes
    lanes = target.lanes
    vectors = -(-output.run(batch) // lanes)
    widest = KERNELS[step.op][1][-1]
    channels = source.channels // planes
    panel = max(1, PANEL_BYTES // (4 * lanes * channels * widest)) * widest
    panels = -(-vectors // panel)
    nbytes = packed.values.nbytes
    values = channels * vectors * lanes * 4
    if nbytes <= SPLIT * values:
        panels = max(panels, min(LEAST, vectors))
    panel = -(-vectors // panels)
    panels = -(-vectors // panel)
    record[records.VECTORS] = vectors
    record[records.PANEL] = panel
    record[records.LANES] = lanes
    record[records.MASK] = tables.address(pixel_mask(output, batch, lanes))
    parts = _fill(record, step, packed, offsets, bias, target, tables, -(-ITEMS // panels))
    record[records.ITEMS] = panels * parts


def fill_winograd(
    record: npt.NDArray[np.int64],
    step: Step,
    packed: Packed,
    bias: npt.NDArray[np.float32],
    target: Target,
    tables: Tables,
    output: Layout,
    batch: int,
) -> int:
    """Fill the record of a Winograd convolution; return the bytes of scratch memory it needs."""
    lanes, row = target.lanes, output.row
    channels = int(record[records.SOURCE + 4])
    per_image = -(-output.height // OUTPUTS)
    rows = batch * per_image
    band = max(1, BAND_BYTES // (4 * PLANES * channels * row))
    bands = -(-rows // band)
    if packed.values.nbytes <= SPLIT * channels * rows * OUTPUTS * row * 4:
        bands = max(bands, min(LEAST, rows))
    if bands % LEAST and bands > 1:
        bands = min(bands + 1, rows)
    band = -(-rows // bands)
    bands = -(-rows // band)
    # the zeros left of the first row, the band, and what its last vector reads beyond
    vectors = -(-band * row // lanes)
    line = layout.odd_lines(lanes + (vectors + 1) * lanes + step.node.attrs["dilation"][1] * 16)
    sums = layout.odd_lines(vectors * lanes + lanes)
    record[records.TILE_ROWS_ALL] = rows
    record[records.BAND] = band
    record[records.TILE_ROWS_IMAGE] = per_image
    record[records.LANES] = lanes
    record[records.PAD_TOP] = step.node.attrs["padding"][0]
    record[records.PLANE_CHANNEL] = line
    plane = layout.odd_lines(channels * line)
    record[records.PLANE] = plane
    record[records.SUMS_ROW] = sums
    record[records.SUMS_PLANE] = packed.rows * sums
    record[records.STEP_BYTES] = 4 * packed.rows * packed.columns
    record[records.INPUT_KERNEL] = objects.address(Kernel("winograd_input"), target)
    record[records.OUTPUT_KERNEL] = objects.address(Kernel("winograd_output"), target)
    columns = np.arange(layout.round_up(row, lanes))
    record[records.INSIDE] = tables.address(lane_bits(columns < output.width, lanes))
    record[records.WITHIN] = tables.address(lane_bits(columns < row, lanes))
    record[records.ZEROS] = tables.address(np.zeros(len(columns), np.float32))
    offsets = packed.channels.astype(np.int64) * line - step.node.attrs["padding"][1]
    offsets += packed.positions * step.node.attrs["dilation"][1]
    parts = _fill(
        record, step, packed, offsets.astype(np.int32), bias, target, tables, -(-ITEMS // bands)
    )
    record[records.ITEMS] = bands * parts
    return HEADER + 4 * PLANES * (plane + packed.rows * sums)


def fill_tiles(
    record: npt.NDArray[np.int64],
    step: Step,
    packed: Packed,
    bias: npt.NDArray[np.float32],
    target: Target,
    tables: Tables,
    output: Layout,
    batch: int,
) -> int:
    """Fill the record of a convolution in tiles; return the bytes of scratch memory it needs."""
    lanes, planes = target.lanes, PLANES * PLANES
    source = Layout(*record[records.SOURCE : records.SOURCE + 8].tolist())
    across = -(-output.width // OUTPUTS)
    down = -(-output.height // OUTPUTS)
    groups = next(g for g in (4, 2, 1) if g == 1 or (g <= down and across <= lanes // g))
    along = -(-across * groups // lanes)
    per_image = -(-down // groups) * along
    units = batch * per_image
    band = max(1, BAND_BYTES // (4 * planes * source.channels * lanes))
    bands = -(-units // band)
    if packed.values.nbytes <= SPLIT * source.channels * output.height * output.row * 4 * batch:
        bands = max(bands, min(LEAST, units))
    if bands % LEAST and bands > 1:
        bands = min(bands + 1, units)
    band = -(-units // bands)
    bands = -(-units // band)
    line = layout.odd_lines(band * lanes)
    plane = layout.odd_lines(source.channels * line)
    record[records.TILE_ROWS_ALL] = units
    record[records.BAND] = band
    record[records.TILE_ROWS_IMAGE] = per_image
    record[records.GROUPS] = groups
    record[records.UNITS_ROW] = along
    record[records.LANES] = lanes
    record[[records.PAD_TOP, records.PAD_LEFT]] = step.node.attrs["padding"]
    record[records.PLANE_CHANNEL] = line
    record[records.PLANE] = plane
    record[records.SUMS_ROW] = WIDEST * lanes
    record[records.SUMS_PLANE] = packed.rows * WIDEST * lanes
    record[records.STEP_BYTES] = 4 * packed.rows * packed.columns
    record[records.INPUT_KERNEL] = objects.address(Kernel("tile_input", width=groups), target)
    record[records.OUTPUT_KERNEL] = objects.address(Kernel("tile_output", width=groups), target)
    record[records.ZEROS] = tables.address(np.zeros((along + 1) * OUTPUTS * lanes, np.float32))
    # the four vectors of a unit along a row, [unit][vector][lane]: which pixel each lane holds
    pixel = np.arange(OUTPUTS * lanes).reshape(OUTPUTS, lanes) % (OUTPUTS * lanes // groups)
    pixel = pixel + np.arange(along)[:, None, None] * OUTPUTS * lanes
    read = pixel - step.node.attrs["padding"][1]
    inside = [(at >= 0) & (at < source.width) for at in (read, read + OUTPUTS)]
    record[records.INSIDE] = tables.address(lane_bits(np.concatenate(inside, axis=1), lanes))
    written = [pixel < output.width, pixel < output.row]
    record[records.WITHIN] = tables.address(lane_bits(np.concatenate(written, axis=1), lanes))
    offsets = (packed.channels.astype(np.int64) * line).astype(np.int32)
    parts = _fill(record, step, packed, offsets, bias, target, tables, -(-ITEMS // bands))
    record[records.ITEMS] = bands * parts
    return HEADER + 4 * planes * (plane + packed.rows * WIDEST * lanes)


def conv_offsets(
    node: Node, packed: Packed, source: Layout, kernel: tuple[int, int]
) -> npt.NDArray[np.int32]:
    """Place every kernel step's first input relative to the output pixel.

    Parameters
    ----------
    node : Node
        The convolution.
    packed : Packed
        Its weight: input channel and kernel position of every step.
    source : Layout
        Its input, or the phase planes of its input.
    kernel : tuple of int
        Kernel height and width.

    Returns
    -------
    ndarray of int32, shape (S,)
        Distances in floats.
    """
    row, column = np.divmod(packed.positions.astype(np.int64), kernel[1])
    y, x = row * node.attrs["dilation"][0], column * node.attrs["dilation"][1]
    channel = packed.channels.astype(np.int64)
    if layout.is_strided(node):
        order = layout.phases(node, kernel)
        (y, a), (x, b) = (
            np.divmod(y, node.attrs["stride"][0]),
            np.divmod(x, node.attrs["stride"][1]),
        )
        plane = np.zeros(node.attrs["stride"], np.int64)
        for place, phase in enumerate(order):
            plane[phase] = place
        channel = channel * len(order) + plane[a, b]
    else:
        y, x = y - node.attrs["padding"][0], x - node.attrs["padding"][1]
    return (channel * source.channel + y * source.row + x).astype(np.int32)


def pixel_mask(where: Layout, batch: int, lanes: int) -> npt.NDArray[np.uint8]:
    """Mark the pixels of a run that belong to an image, one bit each.

    Parameters
    ----------
    where : Layout
        The output.
    batch : int
        Images.
    lanes : int
        Pixels of one vector.

    Returns
    -------
    ndarray of uint8, 1-D
        ``max(1, lanes // 8)`` whole bytes per vector, first pixel in the lowest bit.
    """
    run = where.run(batch)
    place = np.arange(layout.round_up(run, lanes))
    within = place % where.image
    inside = (
        (place < run) & (within // where.row < where.height) & (within % where.row < where.width)
    )
    return lane_bits(inside, lanes)


def lane_bits(flags: npt.NDArray[np.bool_], lanes: int) -> npt.NDArray[np.uint8]:
    """Pack flags into masks of one vector each, first flag in the lowest bit, whole bytes."""
    return np.packbits(flags.reshape(-1, lanes), axis=1, bitorder="little").reshape(-1)


def balanced(work: list[int], parts: int) -> list[int]:
    """Cut tiles into at most `parts` runs of about equal work.

    Parameters
    ----------
    work : list of int
        Kernel steps of every tile, in order.
    parts : int
        Runs wanted.

    Returns
    -------
    list of int
        Boundaries, from 0 to ``len(work)``, strictly increasing.
    """
    # a tile without nonzeros still writes its outputs
    total = np.cumsum([0, *(steps + 1 for steps in work)])
    wanted = total[-1] * np.arange(parts + 1) / parts
    return sorted({int(i) for i in np.searchsorted(total, wanted)} | {0, len(work)})


def _fill(
    record: npt.NDArray[np.int64],
    step: Step,
    packed: Packed,
    offsets: npt.NDArray[np.int32],
    bias: npt.NDArray[np.float32],
    target: Target,
    tables: Tables,
    parts: int,
) -> int:
    """Fill what convolutions and linear layers share; return the number of parts."""
    for place, width in enumerate(KERNELS[step.op][1]):
        kernel = kernel_for(step.op, packed, width)
        record[records.KERNELS + place] = objects.address(kernel, target)
    values, indices = tables.address(packed.values), tables.address(packed.indices)
    # a kernel asks for the inputs of the next step: there is one more than steps
    starts = tables.address(np.append(offsets, np.zeros(1, np.int32)))
    rows = np.zeros((len(packed.tiles), records.TILE_FIELDS), np.int64)
    for row, tile in zip(rows, packed.tiles, strict=True):
        row[records.TILE_FIRST] = tile.first
        row[records.TILE_ROWS] = tile.rows
        row[records.TILE_VALUES] = values + 4 * tile.values
        row[records.TILE_OFFSETS] = starts + 4 * tile.steps.start
        row[records.TILE_COUNT] = tile.steps.stop - tile.steps.start
        row[records.TILE_INDICES] = indices + tile.indices
    record[records.TILES] = tables.integers(rows)
    boundaries = balanced(rows[:, records.TILE_COUNT].tolist(), parts)
    record[records.PARTS] = tables.integers(boundaries)
    record[records.PARTS_COUNT] = len(boundaries) - 1
    # the last tile may have fewer rows than its kernel reads
    record[records.BIAS] = tables.address(np.append(bias, np.zeros(packed.rows, np.float32)))
    bounds = np.array(BOUNDS[step.details["activation"]], np.float32)
    record[records.BOUNDS] = tables.address(bounds)
    return len(boundaries) - 1

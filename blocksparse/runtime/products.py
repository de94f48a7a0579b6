"""Records of direct convolutions and linear layers: kernels, offsets, panels, parts."""

# S kernel steps, T row tiles, N images

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from . import layout
from .caches import KIB, second_level
from .kernels import objects, records
from .kernels.kernel import Kernel
from .kernels.records import Layout
from .kernels.target import Target
from .prepack import Packed, RowTile
from .step import Step
from .tables import Tables

PANEL_BYTES = min(256 * KIB, second_level() // 4)
"""Input of one panel of pixels, of one group's channels where there are groups: weights pass by it
in the second-level cache. Where that has 2 MiB, panels of 128 KiB to 1 MiB are within 3 % of each
other. Where it has 512 KiB (one core of a Zen 3), ResNet-50 takes 89.6 ms with panels of 128 KiB
and 93.0 with 256, and 29.9 and 30.7 at 75 %.
"""

ITEMS = 16
"""Work items that a large step is cut into: enough for a few threads to finish together."""

TAIL_VECTORS = 64
"""Vectors of pixels beyond which one more that is half empty is not worth a kernel of its own."""

HALVES = 2
"""Least parts that pixels are cut into where threads share pixels rather than output channels."""

BOUNDS = {"none": (-inf, inf), "relu": (0.0, inf), "relu6": (0.0, 6.0)}
"""The activations in `winograd.CLAMPS`, as the bounds they clamp to."""

KERNELS: dict[int, tuple[str, tuple[int, ...]]] = {
    records.CONV: ("sparse_conv", (1, 2, 3)),
    records.CONV_NM: ("nm_conv", (1, 2, 4, 8)),
    records.WINOGRAD: ("sparse_product", (1, 2, 3)),
    records.LINES_CONV: ("sparse_product", (1, 2, 3)),
    records.TILES_CONV: ("sparse_product", (1, 2)),
    records.LINEAR: ("sparse_linear", (1, 2, 4)),
    records.LINEAR_NM: ("nm_linear", (1, 2, 4)),
}
"""Micro-kernel and its widths by step: vectors of pixels, or images for linear layers."""

ENDING = (records.CONV, records.CONV_NM)
"""Steps whose product writes the outputs itself, and can apply any activation."""


def kernel_for(op: int, packed: Packed, width: int, activation: str = "none") -> Kernel:
    """Return the micro-kernel of a product at one width."""
    return Kernel(KERNELS[op][0], packed.rows, packed.columns, width, packed.group, activation)


def tile_widths(op: int, packed: Packed, target: Target) -> tuple[int, ...]:
    """Vectors or images of the register tiles of a step's micro-kernels, the widest last."""
    widths = KERNELS[op][1]
    if op == records.CONV and packed.rows == 1:
        # One row, as in depthwise convolutions, leaves registers free, and with few sums each
        # multiply-add waits for the one before. MobileNet V2 takes 0.96 of the time so, and 0.94 at
        # 90 % (medians of rounds in turns, Zen 3, one and two threads alike).
        return KERNELS[records.CONV_NM][1]
    if op in (records.CONV, records.WINOGRAD, records.LINES_CONV, records.TILES_CONV):
        return tuple(width for width in widths if width <= target.vectors)
    return widths


@dataclass(frozen=True, eq=False)
class Product:
    """A convolution or linear layer at one batch size, and the record that is filled for it.

    Parameters
    ----------
    record : ndarray of int64
        The record; layouts of what is read and written are there already.
    step : Step
        What is computed.
    packed : Packed
        With which weight.
    bias : ndarray of float32, shape (K,)
        One value an output channel.
    kernel : tuple of int
        Kernel height and width; 1 and 1 for a linear layer.
    batch : int
        Images.
    target, tables : Target, Tables
        What kernels are compiled for, and where arrays are kept.
    """

    record: npt.NDArray[np.int64]
    step: Step
    packed: Packed
    bias: npt.NDArray[np.float32]
    kernel: tuple[int, int]
    batch: int
    target: Target
    tables: Tables

    @property
    def source(self) -> Layout:
        """Where its input lies; phase planes count as channels."""
        return records.layout_at(self.record, records.SOURCE)

    @property
    def output(self) -> Layout:
        """Where its output lies."""
        return records.layout_at(self.record, records.TARGET)

    @property
    def ending(self) -> str:
        """Activation that the kernel applies which writes the outputs, "none" for a clamp."""
        activation = str(self.step.details["activation"])
        return "none" if activation in BOUNDS else activation

    @property
    def bounds(self) -> tuple[float, float]:
        """What the outputs are clamped to."""
        return BOUNDS.get(self.step.details["activation"], BOUNDS["none"])

    def keep(self, place: int, array: npt.NDArray) -> None:
        """Put the address of an array into the record."""
        self.record[place] = self.tables.address(array)

    def call(self, place: int, kernel: Kernel) -> None:
        """Put the address of a micro-kernel into the record."""
        self.record[place] = objects.address(kernel, self.target)


def fill_linear(product: Product) -> int:
    """Fill the record of a linear layer; return the scratch memory a thread needs, none."""
    product.record[records.ITEMS] = fill_product(product, product.packed.channels, ITEMS)
    return 0


def fill_conv(product: Product) -> int:
    """Fill the record of a direct convolution; return the scratch memory a thread needs, none."""
    record, step, packed = product.record, product.step, product.packed
    source, output = product.source, product.output
    strided = layout.is_strided(step.node)
    planes = len(layout.phases(step.node, product.kernel)) if strided else 1
    offsets = conv_offsets(step, packed, source, product.kernel)
    # one channel's phase planes lie before the next channel
    record[records.SOURCE + 1] = source.channel * planes
    lanes = product.target.lanes
    vectors, tail = vectors_and_tail(product)
    if tail:
        kernel = Kernel("sparse_tail", packed.rows, packed.columns, tail, activation=product.ending)
        product.call(records.TAIL, kernel)
    widest = tile_widths(step.op, packed, product.target)[-1]
    channels = source.channels // planes
    # A tile reads the channels of its group only. With those of all groups, which made panels of a
    # few vectors, MobileNet V2 took 1.05 times as long, and 1.09 at 90 % (Zen 3, medians in turns).
    read = channels // step.node.attrs["groups"]
    panel = max(1, PANEL_BYTES // (4 * lanes * read * widest)) * widest
    panels = -(-vectors // panel)
    if step.rows is None and shares_pixels(packed, channels, 4 * vectors * lanes):
        panels = max(panels, min(HALVES, vectors))
    panel = -(-vectors // panels)
    panels = -(-vectors // panel)
    record[records.VECTORS] = vectors
    record[records.PANEL] = panel
    record[records.LANES] = lanes
    product.keep(records.MASK, pixel_mask(output, product.batch, lanes))
    record[records.ITEMS] = panels * fill_product(product, offsets, -(-ITEMS // panels))
    return 0


def vectors_and_tail(product: Product) -> tuple[int, int]:
    """Vectors of pixels of a direct convolution, and pixels behind them that go without one.

    One vector more costs a multiply-add for each row of a tile. The tail costs one for each of its
    pixels, but of vectors of rows, which are half as long with AVX-512, and as fast in pairs.
    """
    output, packed, lanes = product.output, product.packed, product.target.lanes
    vectors, tail = divmod(output.run(product.batch), lanes)
    whole = packed.rows == product.target.rows and product.step.op == records.CONV
    whole &= product.ending == "none" or product.step.other is None
    if whole and 0 < vectors <= TAIL_VECTORS and 0 < tail <= min(output.width, lanes * 7 // 16):
        return vectors, tail
    return vectors + (tail > 0), 0


def shares_pixels(packed: Packed, channels: int, plane_bytes: int) -> bool:
    """Whether threads should share a layer's pixels, or its output channels.

    Who shares pixels reads all weights; who shares channels reads all inputs. So the smaller of the
    two is read twice, unless a plane is less than a page: two threads in one page take lines from
    each other, because the processor's prefetcher fetches along the page what the other has just
    written.

    Parameters
    ----------
    packed : Packed
        The weight.
    channels, plane_bytes : int
        Input channels, and bytes of one.
    """
    return plane_bytes >= layout.PAGE_BYTES and packed.values.nbytes <= channels * plane_bytes


def conv_offsets(
    step: Step, packed: Packed, source: Layout, kernel: tuple[int, int]
) -> npt.NDArray[np.int32]:
    """Place every kernel step's first input relative to the output pixel.

    Parameters
    ----------
    step : Step
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
    channel, y, x = layout.taps(step.node, kernel, packed.channels, packed.positions)
    left = 0 if layout.is_strided(step.node) else step.node.attrs["padding"][1]  # planes hold it
    distance = channel * source.channel + (y - step.top) * source.row + x - left
    return distance.astype(np.int32)


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
        What each run of tiles costs, in order, above 0.
    parts : int
        Runs wanted.

    Returns
    -------
    list of int
        Boundaries, from 0 to ``len(work)``, strictly increasing.
    """
    total = np.cumsum([0, *work])
    wanted = total[-1] * np.arange(parts + 1) / parts
    return sorted({int(i) for i in np.searchsorted(total, wanted)} | {0, len(work)})


def same_steps(packed: Packed, limit: int) -> list[list[RowTile]]:
    """Join neighbouring row tiles with the same steps, up to `limit` output channels.

    Those of a dense weight have, and those of one row of blocks that are higher than a tile. The
    weights of a run's tiles are equally far apart; tiles without steps stay alone.
    """
    runs: list[list[RowTile]] = []
    for tile in packed.tiles:
        run = runs[-1] if runs else []
        rows = sum(one.rows for one in run)
        if (
            run
            and run[-1].rows == packed.rows
            and run[0].steps == tile.steps
            and tile.steps.stop > tile.steps.start
            and rows + tile.rows <= limit
        ):
            run.append(tile)
        else:
            runs.append([tile])
    return runs


def fill_product(product: Product, offsets: npt.NDArray[np.int32], parts: int) -> int:
    """Fill what convolutions and linear layers share; return the number of parts.

    Parameters
    ----------
    product : Product
        The layer.
    offsets : ndarray of int32, shape (S,)
        Place of every kernel step's first input.
    parts : int
        Parts wanted that the row tiles are cut into.
    """
    record, step, packed = product.record, product.step, product.packed
    target, tables = product.target, product.tables
    widths = tile_widths(step.op, packed, target)
    record[records.WIDEST] = widths[-1]
    for place, width in enumerate(widths):
        activation = product.ending if step.op in ENDING else "none"
        product.call(records.KERNELS + place, kernel_for(step.op, packed, width, activation))
    values, indices = tables.address(packed.values), tables.address(packed.indices)
    # a kernel asks for the inputs of the next step: there is one more than steps
    starts = tables.address(np.append(offsets, np.zeros(1, np.int32)))
    # no more of them together than leave the parts wanted
    limit = min(target.together, -(-len(product.bias) // parts)) if step.op == records.CONV else 1
    runs = same_steps(packed, limit)
    rows = np.zeros((len(runs), records.TILE_FIELDS), np.int64)
    for row, run in zip(rows, runs, strict=True):
        tile = run[0]
        row[records.TILE_FIRST] = tile.first
        row[records.TILE_ROWS] = sum(one.rows for one in run)
        row[records.TILE_VALUES] = values + 4 * tile.values
        row[records.TILE_NEXT] = 4 * (run[-1].values - tile.values) // max(1, len(run) - 1)
        row[records.TILE_OFFSETS] = starts + 4 * tile.steps.start
        row[records.TILE_COUNT] = tile.steps.stop - tile.steps.start
        row[records.TILE_INDICES] = indices + tile.indices
    record[records.TILES] = tables.integers(rows)
    # a tile without nonzeros still writes its outputs
    work = [
        len(run) * (int(row[records.TILE_COUNT]) + 1) for run, row in zip(runs, rows, strict=True)
    ]
    boundaries = balanced(work, parts)
    record[records.PARTS] = tables.integers(boundaries)
    record[records.PARTS_COUNT] = len(boundaries) - 1
    # the last tile may have fewer rows than its kernel reads
    product.keep(records.BIAS, np.append(product.bias, np.zeros(packed.rows, np.float32)))
    product.keep(records.BOUNDS, np.array(product.bounds, np.float32))
    return len(boundaries) - 1

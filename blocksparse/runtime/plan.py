"""A network at one batch size: every offset known, ready to run.

The plan turns steps into the int64 records that the compiled program walks, and the input channels
and kernel positions of prepared weights into offsets in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blocksparse.format import Model

from . import layout
from .bands import fill_columns, fill_lines, fill_tiles
from .kernels import call_record, loops, objects, records
from .kernels.kernel import Kernel
from .kernels.records import Layout
from .kernels.target import Target
from .memory import place_values
from .products import ITEMS, Product, fill_conv, fill_linear, lane_bits, pixel_mask
from .step import Step, Steps
from .steps import kernel_size
from .tables import Tables
from .windows import FAST_WINDOW, window_sizes

CHUNK_FLOATS = 32 * 1024
"""Floats of one work item of a step that only moves data."""

Record = npt.NDArray[np.int64]

FILL = {
    records.CONV: fill_conv,
    records.CONV_NM: fill_conv,
    records.WINOGRAD: fill_columns,
    records.LINES_CONV: fill_lines,
    records.TILES_CONV: fill_tiles,
    records.LINEAR: fill_linear,
    records.LINEAR_NM: fill_linear,
}
"""What fills the record of a product, by the step that computes it; it returns the bytes of scratch
memory that a thread needs."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What one run needs besides memory and input.

    Parameters
    ----------
    records : ndarray of int64, shape (steps, records.FIELDS)
        The program.
    origins : ndarray of int64, shape (steps,)
        Step of the whole network that each belongs to; see `halves`.
    integers : ndarray of int64, 1-D
        Row tiles, part boundaries, phase shifts.
    floats : int
        Size of the memory that holds all values.
    scratch : int
        Bytes of scratch memory that every thread needs.
    inputs, outputs : tuple of int
        Shape of what comes in and out, with as many images in front: of a whole network
        (N, C, H, W) and (N, classes).
    kept : list of ndarray
        Arrays whose addresses stand in the records; they must live as long as the plan.
    """

    records: Record
    origins: npt.NDArray[np.int64]
    integers: npt.NDArray[np.int64]
    floats: int
    scratch: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kept: list[npt.NDArray]

    @property
    def counters(self) -> int:
        """Number of int64 counters that `program.run` needs."""
        return len(self.records) * call_record.COUNTER_STRIDE


def bind(model: Model, steps: Steps, target: Target, batch: int) -> Plan:
    """Prepare a network for a batch size.

    Parameters
    ----------
    model : Model
        Gives biases, scales and shifts.
    steps : Steps
        The network as steps.
    target : Target
        Gives vector length; kernels are compiled for it here.
    batch : int
        Images, at least 1.

    Raises
    ------
    ValueError
        Where the batch needs more memory than 32-bit offsets reach.
    """
    return _Binding(model, steps, target, batch).run()


class _Binding:
    def __init__(self, model: Model, steps: Steps, target: Target, batch: int) -> None:
        self.model, self.steps, self.target, self.batch = model, steps, target, batch
        self.tables = Tables()
        self.scratch = 64
        self.bases, floats = place_values(steps, batch)
        # The last vector and kernel positions reach beyond the last pixel of the last channel; at
        # column stride 2 a row of outputs, padding included, reaches twice its length, and a pool
        # reads the vectors that follow.
        widest = max((frame.image for frame in steps.frames.values()), default=0)
        self.floats = floats + 2 * widest + 256
        if self.floats >= 2**31:
            gib = self.floats * 4 / 2**30
            raise ValueError(
                f"a batch of {batch} needs {gib:.1f} GiB for intermediate values, more than "
                "32-bit offsets reach; run the images in smaller batches"
            )

    def run(self) -> Plan:
        table = np.zeros((len(self.steps.steps), records.FIELDS), np.int64)
        fill: dict[int, Callable[[Record, Step], None]] = {
            **dict.fromkeys(FILL, self._product),
            records.POOL: self._pool,
            records.ADAPTIVE_POOL: self._adaptive_pool,
            records.ELEMENTWISE: self._elementwise,
            records.COPY: self._copy,
            records.LOAD: self._copy,
            records.STORE: self._copy,
        }
        for record, step in zip(table, self.steps.steps, strict=True):
            record[records.OP] = step.op
            record[records.OTHER] = -1
            record[records.COMPUTE] = loops.address(loops.ITEMS[step.op])
            record[records.JOINED] = step.joined
            fill[step.op](record, step)
        integers = self.tables.joined()
        origins = np.array(self.steps.origins or range(len(table)), np.int64)
        return Plan(
            table, origins, integers, self.floats, self.scratch,
            inputs=(self.batch, *self.steps.shapes[self.steps.input]),
            outputs=(self.batch, *self.steps.shapes[self.steps.output]),
            kept=self.tables.kept,
        )  # fmt: skip

    def _layout(self, name: str) -> Layout:
        place, shape = self.steps.places[name], self.steps.shapes[name]
        frame = self.steps.frames.get(place.owner)
        owner_shape = self.steps.shapes[place.owner]
        owner = layout.place(owner_shape, frame, self.bases[place.owner], self.batch)
        height, width = shape[1:] if len(shape) == 3 else (1, 1)
        return Layout(
            owner.base + place.channel * owner.channel,
            owner.channel,
            owner.image,
            owner.row,
            shape[0],
            height,
            width,
            owner.margin,
        )

    def _read(self, step: Step) -> Layout:
        """Lay out what a step reads: half a value with the rows it needs of the other half."""
        where = self._layout(step.source)
        return where if step.rows is None else step.rows.extended(where)

    def _join(self, record: Record, step: Step, stride: int) -> None:
        """Let a copy or pool read the lower half of its input, too."""
        if step.joins is not None and step.other is not None:
            _put(record, records.OTHER, step.joins.extended(self._layout(step.other)))
            record[records.SPLIT] = step.joins.start
            record[records.LOWER_TOP] = step.joins.top + step.joins.start * stride

    def _move(self, record: Record, step: Step) -> None:
        """Fill source and target, and cut the target into chunks of rows."""
        _put(record, records.SOURCE, self._read(step))
        target = self._layout(step.target)
        _put(record, records.TARGET, target)
        self._by_rows(record, step, target)

    def _adaptive_pool(self, record: Record, step: Step) -> None:
        self._move(record, step)
        if step.other is not None:  # the lower half
            _put(record, records.OTHER, self._layout(step.other))
        channels = self.steps.shapes[step.source][0]
        if step.details["flat"]:
            target = self._layout(step.target)
            flat = Layout(target.base, 1, target.image, 1, channels, 1, 1, -1)
            _put(record, records.TARGET, flat)
        self._cut(record, channels, ITEMS, by_channels=True)
        if step.node.shape[1:] == (1, 1):
            source = self._layout(step.source)
            pixels = source._replace(row=source.width)
            self._fast(record, Kernel("pool_mean"), pixels, pixels, [0], 1)
            _, height, width = self.model.graph.shapes[step.node.inputs[0]]
            count = np.array([height * width], np.float32)
            record[records.DIVISORS] = self.tables.address(count)

    def _by_rows(self, record: Record, step: Step, where: Layout, planes: int = 1) -> None:
        """Cut a move into items of rows, or of channels, see `_share`.

        `planes` output channels come from one input channel.
        """
        rows, channels = self.batch * where.height, where.channels // planes
        self._share(record, step, where, channels, rows, planes * where.width)

    def _share(
        self, record: Record, step: Step, where: Layout, channels: int, lines: int, floats: int
    ) -> None:
        """Cut lines of so many floats in each of so many channels into items.

        They are channels where a channel is less than a page, for two threads in one page disturb
        each other, see `products.shares_pixels`: the copies of ResNet-50 took 0.40 ms so in place
        of 0.63, and the pools of Inception V3 0.77 in place of 1.2. And where one thread does all:
        a channel lies in one piece, and ResNet's max pool takes 0.7 to 0.85 of the time.
        """
        items = layout.round_up(channels * lines * floats // CHUNK_FLOATS + 1, 2)
        small = 4 * where.channel < layout.PAGE_BYTES
        by_channels = channels >= items and (small or self._by_one(step))
        self._cut(record, channels if by_channels else lines, items, by_channels)

    def _by_one(self, step: Step) -> bool:
        """Whether a step is one thread's alone, but for a little help: that of a half."""
        if self.steps.halves:
            return step.target in self.steps.halves
        return self.batch == 1  # threads that share an image have it in halves

    def _cut(self, record: Record, count: int, items: int, by_channels: bool) -> None:
        chunk = -(-count // min(count, items))
        record[records.CHUNK] = chunk
        record[records.ITEMS] = -(-count // chunk)
        record[records.BY_CHANNELS] = by_channels

    def _copy(self, record: Record, step: Step) -> None:
        shape = self.steps.shapes[step.source]
        source, target = self._read(step), self._layout(step.target)
        if step.details.get("flat"):  # pixels of a feature map become features of a vector
            channels, height, width = shape
            plane = height * width
            target = Layout(target.base, plane, target.image, width, channels, height, width, -1)
        if step.op == records.LOAD:
            source = self._outside(step, shape)
        if step.op == records.STORE:
            target = self._outside(step, shape)
        if len(shape) == 1:  # a vector is one row rather than many channels of one pixel
            source, target = _as_row(source), _as_row(target)
        _put(record, records.SOURCE, source)
        _put(record, records.TARGET, target)
        self._join(record, step, step.details["scale"][1])
        record[records.SCALE : records.SCALE + 3] = step.details["scale"]
        record[records.SHIFT : records.SHIFT + 3] = step.details["shift"]
        planes = step.details.get("planes", [(0, 0)])
        record[records.PLANES] = len(planes)
        record[records.PLANE_SHIFTS] = self.tables.integers(planes)
        (scale_c, _, scale_x), (shift_c, _, shift_x) = (step.details[k] for k in ("scale", "shift"))
        # the vector code takes every channel in turn; a column far left of the first one might lie
        # before all memory
        if (
            step.op == records.COPY
            and len(shape) == 3
            and (scale_c, shift_c, scale_x) == (1, 0, 2)
            and shift_x >= -layout.ALIGN
        ):
            columns = [shift_x + phase for phase in (0, 1)]
            self._fast(record, Kernel("copy_phases"), source, target, columns, 2)
        self._by_rows(record, step, target, len(planes) if record[records.FAST] else 1)

    def _outside(self, step: Step, shape: tuple[int, ...]) -> Layout:
        """Lay out the caller's array, or the rows of it that are a half's."""
        if step.rows is None:
            return layout.contiguous(shape)
        name = self.steps.input if step.op == records.LOAD else self.steps.output
        where = layout.contiguous(self.steps.shapes[name])
        return where._replace(base=step.rows.start * where.row, height=step.rows.height)

    def _fast(
        self,
        record: Record,
        kernel: Kernel,
        source: Layout,
        target: Layout,
        columns: list[int],
        stride: int,
    ) -> None:
        """Give a step a micro-kernel that reads input column ``stride * x + c`` for each c."""
        lanes = self.target.lanes
        x = np.arange(layout.round_up(target.row, lanes))
        read = [stride * x + column for column in columns]
        inside = x < target.width
        record[records.COMPUTE] = loops.address(loops.FAST[int(record[records.OP])])
        record[records.FAST] = objects.address(kernel, self.target)
        record[records.LANES] = lanes
        record[records.ROW_VECTORS] = len(x) // lanes
        record[records.COLUMN_MASKS] = self.tables.address(
            lane_bits(np.stack([(c >= 0) & (c < source.width) & inside for c in read]), lanes)
        )
        record[records.WITHIN] = self.tables.address(
            lane_bits(np.stack([x < target.row, inside]), lanes)
        )

    def _pool(self, record: Record, step: Step) -> None:
        self._move(record, step)
        attrs = step.node.attrs
        self._join(record, step, attrs["stride"][0])
        record[records.KIND] = step.details["kind"]
        record[[records.KERNEL_H, records.KERNEL_W]] = attrs["kernel"]
        record[[records.STRIDE_H, records.STRIDE_W]] = attrs["stride"]
        record[[records.PAD_H, records.PAD_W]] = step.top, attrs["padding"][1]
        record[[records.DILATION_H, records.DILATION_W]] = attrs.get("dilation", (1, 1))
        record[records.COUNT_PAD] = attrs.get("count_include_pad", False)
        (height, width), stride, pad = attrs["kernel"], attrs["stride"][1], attrs["padding"][1]
        source, target = self._read(step), self._layout(step.target)
        # rows of a window come together in scratch memory, padding included
        reach = (target.width - 1) * stride + (width - 1) * attrs.get("dilation", (1, 1))[1] + 1
        line = records.HEADER + 4 * max(reach, pad + source.width)
        if (
            max(height, width) > FAST_WINDOW
            or stride > 2
            or attrs.get("dilation", (1, 1)) != (1, 1)
        ):
            self.scratch = max(self.scratch, line)
            return
        kind = "pool_max" if step.details["kind"] == records.MAX_POOL else "pool_avg"
        kernel = Kernel(kind, height, width, stride)
        self._fast(record, kernel, source, target, [j - pad for j in range(width)], stride)
        shape = self.model.graph.shapes[step.node.inputs[0]]
        floats = int(record[records.ROW_VECTORS]) * self.target.lanes
        sizes = window_sizes(attrs, shape, step.node.shape, floats)
        start = 0 if step.rows is None or step.joins is not None else step.rows.start
        record[records.DIVISORS] = self.tables.address(
            np.ascontiguousarray(sizes[start : start + target.height])
        )

    def _elementwise(self, record: Record, step: Step) -> None:
        function, lanes = step.details["function"], self.target.lanes
        places = {records.SOURCE: step.source, records.TARGET: step.target}
        if step.other is not None:
            places[records.OTHER] = step.other
        layouts = {at: self._layout(name) for at, name in places.items()}
        if "halo" in step.details and step.rows is not None:
            if step.rows.height == 0:
                return
            layouts = step.rows.borders(*layouts.values())
        is_map = len(self.steps.shapes[step.target]) == 3
        if function == "affine":
            for at, part in ((records.SCALES, "scale"), (records.SHIFTS, "shift")):
                vector = self.model.vectors[f"{step.node.name}.{part}"]
                record[at] = self.tables.address(np.ascontiguousarray(vector))
        elif not is_map:  # all features are one line, unless each has a scale of its own
            layouts = {at: _as_row(where) for at, where in layouts.items()}
        for at, where in layouts.items():
            _put(record, at, where)
        # every image has its own gates; and between vectors may lie the rest of a concatenation
        runs = self.batch if function == "gate" or not is_map else 1
        output = layouts[records.TARGET]
        run = output.run(self.batch // runs)
        vectors = -(-run // lanes)
        kernel = Kernel(f"pointwise_{function}", activation=step.details["activation"])
        record[records.KERNELS] = objects.address(kernel, self.target)
        record[records.MASK] = self.tables.address(pixel_mask(output, self.batch // runs, lanes))
        record[records.WITHIN] = self.tables.address(
            lane_bits(np.arange(vectors * lanes) < run, lanes)
        )
        record[records.VECTORS], record[records.RUNS] = vectors, runs
        self._share(record, step, output, output.channels, runs * vectors, lanes)

    def _product(self, record: Record, step: Step) -> None:
        assert step.packed is not None
        name = step.node.name
        _put(record, records.SOURCE, self._read(step))
        _put(record, records.TARGET, self._layout(step.target))
        if step.other is not None:
            _put(record, records.OTHER, self._layout(step.other))
        bias = self.model.vectors.get(f"{name}.bias")
        if bias is None:
            bias = np.zeros(self.model.weights[name].shape[0], np.float32)
        kernel = kernel_size(self.model, step.node) if step.node.op == "conv2d" else (1, 1)
        product = Product(
            record, step, step.packed, bias, kernel, self.batch, self.target, self.tables
        )
        self.scratch = max(self.scratch, FILL[step.op](product))


def _put(record: Record, at: int, where: Layout) -> None:
    record[at : at + len(where)] = where


def _as_row(where: Layout) -> Layout:
    return Layout(where.base, 0, where.image, where.channels, 1, 1, where.channels, -1)

"""A network at one batch size: every offset known, ready to run.

The plan turns steps into the int64 records that the compiled program walks, and the input channels and kernel positions
of prepared weights into offsets in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from blocksparse.format import ACTIVATIONS, Model

from . import layout
from .kernels import objects, program, views
from .kernels.microkernels import Kernel
from .kernels.target import Target
from .layout import Layout
from .memory import Lifetime, assign
from .prepack import Packed
from .steps import Step, Steps, kernel_size

PANEL_BYTES = 256 * 1024
"""Input of one panel of pixels: a quarter of a common second-level cache, the rest is for weights passing by."""

ITEMS = 16
"""Work items that a large step is cut into: enough for a few threads to finish together."""

CHUNK_FLOATS = 32 * 1024
"""Floats of one work item of a step that only moves data."""

WIDTHS = {
    views.CONV: (1, 2, 3),
    views.CONV_NM: (1, 2, 4, 8),
    views.LINEAR: (1, 2, 4),
    views.LINEAR_NM: (1, 2, 4),
}
"""Micro-kernel widths by step: vectors of pixels, or images for linear layers."""

_OPS = {
    views.CONV: "sparse_conv", views.CONV_NM: "nm_conv", views.LINEAR: "sparse_linear", views.LINEAR_NM: "nm_linear",
}  # fmt: skip

_BOUNDS = {"none": (-inf, inf), "relu": (0.0, inf), "relu6": (0.0, 6.0)}


@dataclass(frozen=True, eq=False)
class Plan:
    """What one run needs besides memory and input.

    Parameters
    ----------
    batch : int
        Images.
    records : ndarray of int64, shape (steps, views.FIELDS)
        The program.
    tables : ndarray of int64, 1-D
    vectors : ndarray of float32, 1-D
    floats : int
        Size of the memory that holds all values.
    kept : list
        Arrays whose addresses stand in the records; they must live as long as the plan.
    """

    batch: int
    records: npt.NDArray[np.int64]
    tables: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32]
    floats: int
    kept: list[np.ndarray]

    def counters(self) -> npt.NDArray[np.int64]:
        """Return fresh counters for `program.run`, on cache lines of their own."""
        return np.zeros((len(self.records) + 1) * program.COUNTER_STRIDE, np.int64)


def kernel_for(step: Step, width: int) -> Kernel:
    """Return the micro-kernel of a product step at one width."""
    packed = step.packed
    assert packed is not None
    return Kernel(_OPS[step.op], packed.rows, packed.columns, width, packed.group)


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
        self.tables: list[np.ndarray] = [np.zeros(2, np.int64)]  # plane shifts of an ordinary copy
        self.table_length = 2
        self.vectors: list[np.ndarray] = [np.zeros(0, np.float32)]
        self.vector_length = 0
        self.kept: list[np.ndarray] = []
        self.masks: dict[tuple[int, ...], np.ndarray] = {}
        self.bases, floats = self._memory()
        # Vectors and kernel positions reach a little beyond the last pixel of the last channel.
        self.floats = (
            floats + max((frame.image for frame in steps.frames.values()), default=0) + 256
        )
        if self.floats >= 2**31:
            raise ValueError(
                f"a batch of {batch} needs {self.floats * 4 / 2**30:.1f} GiB for intermediate values, more than 32-bit "
                "offsets reach; run the images in smaller batches"
            )

    def run(self) -> Plan:
        fill = {
            views.CONV: self._conv, views.CONV_NM: self._conv, views.LINEAR: self._linear, views.LINEAR_NM: self._linear,
            views.POOL: self._pool, views.ADAPTIVE_POOL: self._move, views.ELEMENTWISE: self._elementwise,
            views.COPY: self._copy, views.LOAD: self._copy, views.STORE: self._copy,
        }  # fmt: skip
        records = np.zeros((len(self.steps.steps), views.FIELDS), np.int64)
        for record, step in zip(records, self.steps.steps, strict=True):
            record[views.OP] = step.op
            record[views.OTHER] = -1
            fill[step.op](record, step)
        return Plan(
            self.batch, records, np.concatenate(self.tables), np.concatenate(self.vectors), self.floats, self.kept
        )  # fmt: skip

    def _memory(self) -> tuple[dict[str, int], int]:
        lives: dict[str, Lifetime] = {}
        for i, step in enumerate(self.steps.steps):
            for name in (step.source, step.target, step.other):
                if name is not None:
                    owner = self.steps.places[name].owner
                    first = lives[owner].first if owner in lives else i
                    lives[owner] = Lifetime(first, i)
        sizes = {
            name: layout.size(self.steps.shapes[name], self.steps.frames.get(name), self.batch)
            for name in lives
        }
        return assign(sizes, lives)

    def _layout(self, name: str) -> Layout:
        place = self.steps.places[name]
        shape = self.steps.shapes[name]
        owner = layout.place(
            self.steps.shapes[place.owner],
            self.steps.frames.get(place.owner),
            self.bases[place.owner],
            self.batch,
        )
        height, width = shape[1:] if len(shape) == 3 else (1, 1)
        base = owner.base + place.channel * owner.channel
        return Layout(
            base, owner.channel, owner.image, owner.row, shape[0], height, width, owner.margin
        )

    def _put(self, record: npt.NDArray[np.int64], at: int, where: Layout) -> None:
        record[at : at + 8] = (
            where.base, where.channel, where.image, where.row, where.channels, where.height, where.width, where.margin,
        )  # fmt: skip

    def _table(self, values: npt.ArrayLike) -> int:
        """Append to the tables; return the place."""
        array = np.asarray(values, np.int64).reshape(-1)
        at = self.table_length
        self.tables.append(array)
        self.table_length += len(array)
        return at

    def _vector(self, name: str) -> int:
        array = self.model.vectors[name]
        at = self.vector_length
        self.vectors.append(array)
        self.vector_length += len(array)
        return at

    def _keep(self, array: np.ndarray) -> int:
        """Keep an array alive; return its address."""
        self.kept.append(array)
        return int(array.ctypes.data)

    def _by_channels(self, record: npt.NDArray[np.int64], where: Layout) -> None:
        """Cut a step into chunks of channels."""
        per_channel = self.batch * where.height * where.width
        chunk = max(1, min(-(-where.channels // 2), CHUNK_FLOATS // per_channel))
        record[views.CHUNK] = chunk
        record[views.ITEMS] = -(-where.channels // chunk)

    def _move(self, record: npt.NDArray[np.int64], step: Step) -> None:
        target = self._layout(step.target)
        self._put(record, views.SOURCE, self._layout(step.source))
        self._put(record, views.TARGET, target)
        self._by_channels(record, target)

    def _copy(self, record: npt.NDArray[np.int64], step: Step) -> None:
        self._move(record, step)
        record[views.SCALE : views.SCALE + 3] = step.details["scale"]
        record[views.SHIFT : views.SHIFT + 3] = step.details["shift"]
        planes = step.details.get("planes", [(0, 0)])
        record[views.PLANES] = len(planes)
        record[views.PLANE_SHIFTS] = self._table(planes)
        source = self.steps.shapes[step.source]
        if step.details.get("flat"):
            channels, height, width = source
            to = self._layout(step.target)
            flat = Layout(to.base, height * width, to.image, width, channels, height, width, -1)
            self._put(record, views.TARGET, flat)
            self._by_channels(record, flat)
        elif len(source) == 1:  # a vector is one row rather than many channels of one pixel
            for at in (views.SOURCE, views.TARGET):
                image = record[at + 2] if at == views.SOURCE or step.op == views.COPY else source[0]
                base = record[at] if at == views.SOURCE or step.op == views.COPY else 0
                self._put(record, at, Layout(base, 0, image, source[0], 1, 1, source[0], -1))
            record[views.CHUNK] = record[views.ITEMS] = 1
        elif step.op == views.LOAD:
            self._put(record, views.SOURCE, layout.contiguous(source))
        elif step.op == views.STORE:
            self._put(record, views.TARGET, layout.contiguous(source))

    def _pool(self, record: npt.NDArray[np.int64], step: Step) -> None:
        self._move(record, step)
        attrs = step.node.attrs
        kind = step.details["kind"]
        record[views.KIND] = kind
        record[[views.KERNEL_H, views.KERNEL_W]] = attrs["kernel"]
        record[[views.STRIDE_H, views.STRIDE_W]] = attrs["stride"]
        record[[views.PAD_H, views.PAD_W]] = attrs["padding"]
        record[[views.DILATION_H, views.DILATION_W]] = attrs.get("dilation", (1, 1))
        record[views.COUNT_PAD] = attrs.get("count_include_pad", False)

    def _elementwise(self, record: npt.NDArray[np.int64], step: Step) -> None:
        self._move(record, step)
        if step.other is not None:
            self._put(record, views.OTHER, self._layout(step.other))
        record[views.FUNCTION] = step.details["function"]
        record[views.ACTIVATION] = ACTIVATIONS.index(step.details["activation"])
        if step.details["function"] == views.AFFINE:
            record[views.SCALE_AT] = self._vector(f"{step.node.name}.scale")
            record[views.SHIFT_AT] = self._vector(f"{step.node.name}.shift")

    def _product(
        self, record: npt.NDArray[np.int64], step: Step, offsets: np.ndarray, parts: int
    ) -> int:
        """Fill what convolutions and linear layers share; return the number of parts."""
        packed = step.packed
        assert packed is not None
        for i, width in enumerate(WIDTHS[step.op]):
            record[views.KERNELS + i] = objects.address(kernel_for(step, width), self.target)
        values, steps_at = self._keep(packed.values), self._keep(offsets)
        indices = self._keep(packed.indices)
        rows = [
            (
                t.first, t.rows, values + 4 * t.values, steps_at + 4 * t.steps.start, t.steps.stop - t.steps.start,
                indices + t.indices,
            )
            for t in packed.tiles
        ]  # fmt: skip
        record[views.TILES] = self._table(rows)
        boundaries = balanced([row[4] for row in rows], parts)
        record[views.PARTS] = self._table(boundaries)
        record[views.PARTS_COUNT] = len(boundaries) - 1
        outputs = self.model.weights[step.node.name].shape[0]
        bias = np.zeros(outputs + 8, np.float32)  # the last tile may have fewer rows than it reads
        given = self.model.vectors.get(f"{step.node.name}.bias")
        if given is not None:
            bias[:outputs] = given
        record[views.BIAS] = self._keep(bias)
        record[views.BOUNDS] = self._keep(np.array(_BOUNDS[step.details["activation"]], np.float32))
        return len(boundaries) - 1

    def _linear(self, record: npt.NDArray[np.int64], step: Step) -> None:
        packed = step.packed
        assert packed is not None
        self._put(record, views.SOURCE, self._layout(step.source))
        self._put(record, views.TARGET, self._layout(step.target))
        record[views.ITEMS] = self._product(record, step, packed.channels, ITEMS)

    def _conv(self, record: npt.NDArray[np.int64], step: Step) -> None:
        packed = step.packed
        assert packed is not None
        source, target = self._layout(step.source), self._layout(step.target)
        kernel = kernel_size(self.model, step.node)
        planes = 1
        if layout.is_strided(step.node):
            planes = len(layout.phases(step.node, kernel))
        offsets = self._offsets(step, packed, source, kernel, planes)
        # consecutive channels lie behind the phase planes of one
        spread = Layout(
            source.base, source.channel * planes, source.image, source.row, source.channels, source.height,
            source.width, source.margin,
        )  # fmt: skip
        self._put(record, views.SOURCE, spread)
        self._put(record, views.TARGET, target)
        if step.other is not None:
            self._put(record, views.OTHER, self._layout(step.other))
        lanes = self.target.lanes
        vectors = -(-target.run(self.batch) // lanes)
        inputs = self.steps.shapes[step.node.inputs[0]][0]
        widest = WIDTHS[step.op][-1]
        panel = PANEL_BYTES // (4 * lanes * inputs) // widest * widest
        panel = min(vectors, max(widest, panel))
        panels = -(-vectors // panel)
        panel = layout.round_up(-(-vectors // panels), 1)
        record[views.VECTORS] = vectors
        record[views.PANEL] = panel
        record[views.PANELS_COUNT] = -(-vectors // panel)
        record[views.LANES] = lanes
        record[views.MASK] = self._mask(target)
        parts = self._product(
            record, step, offsets, max(1, -(-ITEMS // int(record[views.PANELS_COUNT])))
        )
        record[views.ITEMS] = record[views.PANELS_COUNT] * parts

    def _offsets(
        self, step: Step, packed: Packed, source: Layout, kernel: tuple[int, int], planes: int
    ) -> npt.NDArray[np.int32]:
        """Place of every kernel step's first input, relative to the output pixel, in floats."""
        attrs = step.node.attrs
        i, j = np.divmod(packed.positions.astype(np.int64), kernel[1])
        y, x = i * attrs["dilation"][0], j * attrs["dilation"][1]
        plane = np.zeros_like(y)
        if layout.is_strided(step.node):
            order = layout.phases(step.node, kernel)
            (y, a), (x, b) = np.divmod(y, attrs["stride"][0]), np.divmod(x, attrs["stride"][1])
            lookup = np.zeros(attrs["stride"], np.int64)
            for p, phase in enumerate(order):
                lookup[phase] = p
            plane = lookup[a, b]
        else:
            y, x = y - attrs["padding"][0], x - attrs["padding"][1]
        channel = packed.channels.astype(np.int64) * planes + plane
        return (channel * source.channel + y * source.row + x).astype(np.int32)

    def _mask(self, where: Layout) -> int:
        """Address of one bit per pixel of a run, set where the pixel is part of an image."""
        key = (where.image, where.row, where.height, where.width)
        if key not in self.masks:
            run = where.run(self.batch)
            place = np.arange(layout.round_up(run, layout.ALIGN) + 64)
            within = place % where.image
            pixel = (
                (place < run)
                & (within // where.row < where.height)
                & (within % where.row < where.width)
            )
            lanes = self.target.lanes
            bits = pixel[: len(pixel) // lanes * lanes].reshape(-1, lanes)
            self.masks[key] = np.packbits(bits, axis=1, bitorder="little").reshape(-1)
        return self._keep(self.masks[key])


def balanced(work: list[int], parts: int) -> list[int]:
    """Cut tiles into at most `parts` runs of about equal work.

    Parameters
    ----------
    work : list of int
        Work of every tile, in order.
    parts : int
        Runs wanted.

    Returns
    -------
    list of int
        Boundaries, from 0 to ``len(work)``, strictly increasing.
    """
    # a tile without nonzeros still writes its outputs
    total = np.cumsum([0, *(w + 1 for w in work)])
    wanted = total[-1] * np.arange(parts + 1) / parts
    return sorted({int(i) for i in np.searchsorted(total, wanted)} | {0, len(work)})

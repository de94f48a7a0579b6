"""Which rows of its input a step reads, and how many pixels a window holds."""

# H W image

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from blocksparse.format import Model

from . import layout
from .kernels import records
from .step import Step
from .steps import kernel_size

FAST_WINDOW = 5
"""Largest height and width of a pool's window that gets a micro-kernel of its own, written out."""


@dataclass(frozen=True)
class Window:
    """Which rows of its input a step reads: `reach` of them, from output row * stride - pad on."""

    stride: int = 1
    pad: int = 0
    reach: int = 1

    def read(self, rows: range) -> range:
        """Rows that are read for some rows of output, padding included."""
        first, last = rows.start * self.stride - self.pad, rows.stop * self.stride - self.pad
        return range(first, last - self.stride + self.reach)


def window_of(model: Model, step: Step) -> Window:
    """Return which rows a step reads of its source, for each row of its target.

    Parameters
    ----------
    model : Model
        Gives kernel sizes.
    step : Step
        Of a whole network.
    """
    node = step.node
    if layout.is_phases(step.target, node):
        last = max(row for row, _ in layout.phases(node, kernel_size(model, node)))
        return Window(node.attrs["stride"][0], node.attrs["padding"][0], last + 1)
    if node.op == "conv2d" and step.packed is not None:
        reach = (kernel_size(model, node)[0] - 1) * node.attrs["dilation"][0]
        if layout.is_strided(node):  # phase planes hold the padding
            return Window(reach=reach // node.attrs["stride"][0] + 1)
        return Window(1, node.attrs["padding"][0], reach + 1)
    if step.op == records.POOL:
        reach = (node.attrs["kernel"][0] - 1) * node.attrs.get("dilation", (1, 1))[0] + 1
        return Window(node.attrs["stride"][0], node.attrs["padding"][0], reach)
    return Window()


def window_sizes(
    attrs: Mapping[str, Any], source: tuple[int, ...], target: tuple[int, ...], row: int
) -> npt.NDArray[np.float32]:
    """Count the pixels that an average pool divides by.

    Parameters
    ----------
    attrs : mapping
        The pool's attributes.
    source, target : tuple of int
        Shapes (C, H, W) of its input and output.
    row : int
        Floats of a row of the result, at least the output's width.

    Returns
    -------
    ndarray of float32, shape (H, row)
        Ones beyond the width.
    """
    counts = []
    for axis, sizes in enumerate(zip(source[1:], target[1:], strict=True)):
        kernel, stride, pad = (attrs[key][axis] for key in ("kernel", "stride", "padding"))
        start = np.arange(sizes[1]) * stride - pad
        if attrs.get("count_include_pad", False):
            counts.append(np.minimum(start + kernel, sizes[0] + pad) - start)
        else:
            counts.append(np.minimum(start + kernel, sizes[0]) - np.maximum(start, 0))
    result = np.ones((target[1], row), np.float32)
    result[:, : target[2]] = np.outer(*counts)
    return result

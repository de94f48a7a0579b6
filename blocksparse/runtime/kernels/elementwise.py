"""Elementwise operations that no product could take in: sums, gates, scales, activations."""

from __future__ import annotations

from math import exp
from typing import Any

import numpy as np

from . import call_record as c
from . import records as r
from .intrinsics import floats_at, integers_at
from .loop import loop
from .views import opened, span, view, zero_beside

NONE, RELU, RELU6, SIGMOID, HARDSIGMOID, SILU, HARDSWISH = range(7)


@loop
def activate(values: Any, kind: int) -> None:
    """Apply an activation in place; NaN passes."""
    if kind == RELU:
        for i in range(values.size):
            if values[i] < 0:
                values[i] = 0
    elif kind == RELU6:
        for i in range(values.size):
            if values[i] < 0:
                values[i] = 0
            elif values[i] > 6:
                values[i] = 6
    elif kind == SIGMOID:
        for i in range(values.size):
            values[i] = 1 / (1 + exp(-values[i]))
    elif kind == SILU:
        for i in range(values.size):
            values[i] = values[i] / (1 + exp(-values[i]))
    elif kind in (HARDSIGMOID, HARDSWISH):
        for i in range(values.size):
            gate = values[i] + np.float32(3)
            if gate < 0:
                gate = np.float32(0)
            elif gate > 6:
                gate = np.float32(6)
            gate = gate / np.float32(6)
            values[i] = gate if kind == HARDSIGMOID else values[i] * gate


def elementwise_item(call_at: int, step_at: int, item: int, scratch_at: int, tag: int) -> None:
    """Compute one chunk of rows, or of channels; source and target may be the same place."""
    memory, _, step, _, batch = opened(call_at, step_at)
    call = integers_at(call_at, c.FIELDS)
    vectors = floats_at(call[c.VECTORS_AT], call[c.VECTORS_SIZE])
    a, b, other = view(step, r.SOURCE), view(step, r.TARGET), view(step, r.OTHER)
    function = step[r.FUNCTION]
    start, stop, first, last = span(step, item, b.channels, batch * b.height)
    for channel in range(start, stop):
        for index in range(first, last):
            n, y = index // b.height, index % b.height
            zero_beside(memory, b, channel, n, y, batch)
            at = b.base + channel * b.channel + n * b.image + y * b.row
            out = memory[at : at + b.width]
            at = a.base + channel * a.channel + n * a.image + y * a.row
            left = memory[at : at + b.width]
            at = other.base + channel * other.channel + n * other.image
            if function == r.ADD or function == r.MUL:
                right = memory[at + y * other.row : at + y * other.row + b.width]
                if function == r.ADD:
                    for x in range(b.width):
                        out[x] = left[x] + right[x]
                else:
                    for x in range(b.width):
                        out[x] = left[x] * right[x]
            elif function == r.MUL_CHANNEL:
                gate = memory[at]
                for x in range(b.width):
                    out[x] = left[x] * gate
            elif function == r.AFFINE:
                scale, shift = (
                    vectors[step[r.SCALE_AT] + channel],
                    vectors[step[r.SHIFT_AT] + channel],
                )
                for x in range(b.width):
                    out[x] = left[x] * scale + shift
            else:
                for x in range(b.width):
                    out[x] = left[x]
            activate(out, step[r.ACTIVATION])

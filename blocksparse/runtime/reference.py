"""Every operation in plain NumPy: the oracle of the fast engine, and the fallback without Numba.

All arithmetic is float32, weights are made dense, NaN and infinity pass as they do in PyTorch: a
zero weight times NaN is NaN. The compiled engine never multiplies what is not stored, so it may be
finite there.

Legend: N batch, C in-channels, K out-channels, H W image, U V output image, R S kernel taps, g
groups, F O features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from blocksparse.format import Model
from blocksparse.format.graph import Node

Floats: TypeAlias = npt.NDArray[np.float32]

_ONE, _THREE, _SIX = (np.float32(number) for number in (1, 3, 6))


def run(model: Model, x: Floats) -> Floats:
    """Run `model` on a batch of images.

    Parameters
    ----------
    model : Model
        One that passes :func:`blocksparse.format.check_model`.
    x : ndarray of float32, shape (N, C, H, W)

    Returns
    -------
    ndarray of float32, shape (N, classes)
    """
    last_use = {name: i for i, node in enumerate(model.graph.nodes) for name in node.inputs}
    values = {model.graph.inputs[0].name: x}
    with np.errstate(all="ignore"):  # infinity and NaN are answers here, not accidents
        for i, node in enumerate(model.graph.nodes):
            inputs = [values[name] for name in node.inputs]
            values[node.name] = _OPS[node.op](node, inputs, model)
            for name in set(node.inputs):
                if last_use[name] == i and name not in model.graph.outputs:
                    del values[name]
    return np.ascontiguousarray(values[model.graph.outputs[0]])


def activate(x: Floats, activation: str) -> Floats:
    """Apply one of :data:`blocksparse.format.ACTIVATIONS` to an array of any shape."""
    if activation == "relu":
        return np.maximum(x, 0)
    if activation == "relu6":
        return np.clip(x, 0, 6)
    if activation == "sigmoid":
        return np.reciprocal(_ONE + np.exp(-x))
    if activation == "hardsigmoid":
        return np.clip(x + _THREE, 0, 6) / _SIX
    if activation == "silu":
        return np.divide(x, _ONE + np.exp(-x))
    if activation == "hardswish":
        return x * activate(x, "hardsigmoid")
    return x


def conv2d(
    x: Floats,
    weight: Floats,
    bias: Floats | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Floats:
    """Convolve `x` (N, C, H, W) with `weight` (K, C/g, R, S): (N, K, U, V).

    One matrix product per kernel tap, over the pixels that tap meets.
    """
    n = len(x)
    k, per_group, taps_h, taps_w = weight.shape
    x = np.pad(x, ((0, 0), (0, 0), *((pad, pad) for pad in padding)))
    size = [
        (x.shape[2 + i] - dilation[i] * (taps - 1) - 1) // stride[i] + 1
        for i, taps in enumerate((taps_h, taps_w))
    ]
    grouped = weight.reshape(groups, k // groups, per_group, taps_h, taps_w)
    out = np.zeros((n, groups, k // groups, size[0] * size[1]), np.float32)
    for r in range(taps_h):
        for s in range(taps_w):
            seen = _window(x, (r, s), size, stride, dilation)
            seen = seen.reshape(n, groups, per_group, size[0] * size[1])
            out += grouped[..., r, s] @ seen
    out = out.reshape(n, k, *size)
    return out if bias is None else out + bias[:, None, None]


def linear(x: Floats, weight: Floats, bias: Floats | None) -> Floats:
    """Multiply `x` (N, F) with `weight` (O, F): (N, O)."""
    out = x @ weight.T
    return out if bias is None else out + bias


def max_pool2d(
    x: Floats,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
) -> Floats:
    """Take the largest of each window of `x` (N, C, H, W), a NaN if it holds one: (N, C, *size)."""
    x = _pad_for(x, kernel, stride, padding, dilation, size, fill=-np.inf)
    out = np.full((*x.shape[:2], *size), -np.inf, np.float32)
    for tap in np.ndindex(*kernel):
        np.maximum(out, _window(x, tap, size, stride, dilation), out=out)
    return out


def avg_pool2d(
    x: Floats,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    size: Sequence[int],
    count_include_pad: bool,
) -> Floats:
    """Average each window of `x` (N, C, H, W): (N, C, *size).

    A window counts its pixels, with `count_include_pad` those in the padding too, but never those
    that ``ceil_mode`` adds beyond it.
    """
    image = x.shape[2:]
    x = _pad_for(x, kernel, stride, padding, (1, 1), size, fill=0.0)
    total = np.zeros((*x.shape[:2], *size), np.float32)
    for tap in np.ndindex(*kernel):
        total += _window(x, tap, size, stride, (1, 1))
    counts = []
    for i in range(2):
        margin = padding[i] if count_include_pad else 0
        begin = np.arange(size[i]) * stride[i] - padding[i]
        end = np.minimum(begin + kernel[i], image[i] + margin)
        counts.append((end - np.maximum(begin, -margin)).astype(np.float32))
    return total / np.outer(*counts)


def adaptive_avg_pool2d(x: Floats, output_size: Sequence[int]) -> Floats:
    """Average `x` (N, C, H, W) over output_size windows that cover it: (N, C, U, V).

    Window i of u over h pixels is ``floor(i*h/u) : ceil((i+1)*h/u)``; windows may overlap.
    """
    count = np.float32(1)
    for axis, out in zip((2, 3), output_size, strict=True):
        size = x.shape[axis]
        i = np.arange(out)
        begin, end = i * size // out, -(-(i + 1) * size // out)
        pixel = begin[:, None] + np.arange((end - begin).max())
        inside = (pixel < end[:, None]).reshape(out, -1, *([1] * (3 - axis)))
        seen = np.take(x, np.minimum(pixel, size - 1), axis=axis)
        x = np.where(inside, seen, np.float32(0)).sum(axis=axis + 1)
        count = count * (end - begin).astype(np.float32).reshape(-1, *([1] * (3 - axis)))
    return x / count


def _window(
    x: Floats,
    tap: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Floats:
    """Return the pixel that kernel position `tap` meets in each of `size` windows, a view."""
    first = [tap[i] * dilation[i] for i in range(2)]
    rows, columns = (
        slice(first[i], first[i] + (size[i] - 1) * stride[i] + 1, stride[i]) for i in range(2)
    )
    return x[:, :, rows, columns]


def _pad_for(
    x: Floats,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    fill: float,
) -> Floats:
    """Pad `x` before by `padding`, and behind by as much as the last of `size` windows needs."""
    widths = [(0, 0), (0, 0)]
    for i in range(2):
        needed = (size[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        widths.append((padding[i], max(0, needed - x.shape[2 + i] - padding[i])))
    return np.pad(x, widths, constant_values=fill)


def _run_conv2d(node: Node, inputs: list[Floats], model: Model) -> Floats:
    a = node.attrs
    weight, bias = model.weights[node.name].to_dense(), model.vectors.get(f"{node.name}.bias")
    out = conv2d(inputs[0], weight, bias, a["stride"], a["padding"], a["dilation"], a["groups"])
    if len(inputs) == 2:
        out = out + inputs[1]
    return activate(out, a["activation"])


def _run_linear(node: Node, inputs: list[Floats], model: Model) -> Floats:
    weight, bias = model.weights[node.name].to_dense(), model.vectors.get(f"{node.name}.bias")
    return activate(linear(inputs[0], weight, bias), node.attrs["activation"])


def _run_max_pool2d(node: Node, inputs: list[Floats], model: Model) -> Floats:
    a = node.attrs
    size = node.shape[1:]
    return max_pool2d(inputs[0], a["kernel"], a["stride"], a["padding"], a["dilation"], size)


def _run_avg_pool2d(node: Node, inputs: list[Floats], model: Model) -> Floats:
    a = node.attrs
    kernel, stride, padding = a["kernel"], a["stride"], a["padding"]
    return avg_pool2d(inputs[0], kernel, stride, padding, node.shape[1:], a["count_include_pad"])


def _run_affine(node: Node, inputs: list[Floats], model: Model) -> Floats:
    per_channel = (-1, *([1] * (len(node.shape) - 1)))
    scale, shift = (
        model.vectors[f"{node.name}.{suffix}"].reshape(per_channel) for suffix in ("scale", "shift")
    )
    return activate(inputs[0] * scale + shift, node.attrs["activation"])


def _run_slice(node: Node, inputs: list[Floats], model: Model) -> Floats:
    bounds = zip(node.attrs["start"], node.attrs["stop"], node.attrs["step"], strict=True)
    return inputs[0][(slice(None), *(slice(*bound) for bound in bounds))]


def _run_pad(node: Node, inputs: list[Floats], model: Model) -> Floats:
    widths = zip(node.attrs["before"], node.attrs["after"], strict=True)
    return np.pad(inputs[0], ((0, 0), *widths))


_OPS: Mapping[str, Callable[[Node, list[Floats], Model], Floats]] = {
    "conv2d": _run_conv2d,
    "linear": _run_linear,
    "max_pool2d": _run_max_pool2d,
    "avg_pool2d": _run_avg_pool2d,
    "adaptive_avg_pool2d": lambda node, inputs, model: adaptive_avg_pool2d(
        inputs[0], node.attrs["output_size"]
    ),
    "add": lambda node, inputs, model: activate(inputs[0] + inputs[1], node.attrs["activation"]),
    "mul": lambda node, inputs, model: inputs[0] * inputs[1],
    "concat": lambda node, inputs, model: np.concatenate(inputs, axis=1),
    "activation": lambda node, inputs, model: activate(inputs[0], node.attrs["activation"]),
    "affine": _run_affine,
    "flatten": lambda node, inputs, model: inputs[0].reshape(len(inputs[0]), *node.shape),
    "slice": _run_slice,
    "pad": _run_pad,
}

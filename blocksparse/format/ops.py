"""The operations of the graph: which attributes each takes, and the shape it gives.

PyTorch's rules throughout: padding is symmetric and zero (minus infinity in ``max_pool2d``), sizes
round down unless ``ceil_mode``.

Legend: C in-channels, K out-channels, H W image, R S kernel taps, F O features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

Shape = tuple[int, ...]

ACTIVATIONS = ("none", "relu", "relu6", "sigmoid", "hardsigmoid", "silu", "hardswish")

MAX_DIM = 2**24
"""Largest size of one axis of a value or weight, and largest integer attribute."""

MAX_VALUE = 2**28
"""Most entries one value of the graph may have, for one image; with its padding, under windows."""


@dataclass(frozen=True)
class Attr:
    """What one attribute may be.

    Parameters
    ----------
    kind : {"int", "ints", "bool", "activation"}
        ``"ints"`` is a tuple of `length` integers (a JSON array in the file).
    length : int
        Number of entries of ``"ints"``.
    minimum : int
        Least value of each integer.
    """

    kind: str
    length: int = 1
    minimum: int = 0

    def check(self, value: object) -> None:
        """Raise ValueError unless `value` is allowed."""
        if self.kind == "bool":
            good = type(value) is bool
        elif self.kind == "activation":
            good = isinstance(value, str) and value in ACTIVATIONS
        elif self.kind == "int":
            good = self._is_int(value)
        else:
            good = (
                isinstance(value, tuple)
                and len(value) == self.length
                and all(map(self._is_int, value))
            )
        if not good:
            raise ValueError(f"must be {self}, is {value!r}")

    def _is_int(self, value: object) -> bool:
        return type(value) is int and self.minimum <= value <= MAX_DIM

    def __str__(self) -> str:
        if self.kind == "bool":
            return "true or false"
        if self.kind == "activation":
            return f"one of {', '.join(ACTIVATIONS)}"
        count = "an integer" if self.kind == "int" else f"{self.length} integers"
        return f"{count} from {self.minimum} to {MAX_DIM}"


@dataclass(frozen=True)
class Op:
    """One operation.

    Parameters
    ----------
    attrs : mapping
        Attribute name to :class:`Attr`; a node has exactly these.
    inputs : tuple of (int, int or None)
        Least and largest number of inputs; None is no limit.
    infer_shape : callable
        ``infer_shape(attrs, input_shapes, weight_shape) -> shape``, batch axis excluded everywhere;
        `weight_shape` is None for an op without weight. Raises ValueError with the reason where no
        output exists.
    weighted : bool
        Takes a weight, and a bias where the node has one.
    vectors : tuple of str
        Suffixes of the per-channel tensors it always has.
    """

    attrs: Mapping[str, Attr]
    inputs: tuple[int, int | None]
    infer_shape: Callable[[Mapping[str, Any], Sequence[Shape], Shape | None], Shape]
    weighted: bool = False
    vectors: tuple[str, ...] = ()


def _image(shape: Shape) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(f"input must be (C, H, W), is {shape}")
    return shape[0], shape[1], shape[2]


def _conv2d(attrs: Mapping[str, Any], inputs: Sequence[Shape], weight: Shape | None) -> Shape:
    channels, *image = _image(inputs[0])
    groups = attrs["groups"]
    if weight is None or len(weight) != 4:
        raise ValueError(f"weight must be [K, C/groups, kh, kw], is {weight}")
    if channels % groups or weight[0] % groups or weight[1] * groups != channels:
        raise ValueError(
            f"weight {weight} does not fit {channels} input channels in {groups} groups"
        )
    shape = (weight[0], *_windows(channels, image, weight[2:], attrs, attrs["dilation"]))
    if len(inputs) == 2 and inputs[1] != shape:
        raise ValueError(f"residual must have the output's shape {shape}, has {inputs[1]}")
    return shape


def _windows(
    channels: int,
    image: Sequence[int],
    kernel: Sequence[int],
    attrs: Mapping[str, Any],
    dilation: Sequence[int],
) -> Shape:
    """Return how many windows fit along height and width (``pooling_output_shape`` of PyTorch)."""
    ceil_mode = attrs.get("ceil_mode", False)
    counts, padded = [], [channels]
    for size, taps, stride, pad, apart in zip(
        image, kernel, attrs["stride"], attrs["padding"], dilation, strict=True
    ):
        span = apart * (taps - 1) + 1
        room = size + 2 * pad - span
        count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
        # A window that would start in the far padding sees no input: PyTorch drops it.
        if ceil_mode and (count - 1) * stride >= size + pad:
            count -= 1
        if count < 1:
            raise ValueError(f"a window of {span} does not fit a padded size of {size + 2 * pad}")
        counts.append(count)
        # With `ceil_mode` the last window may hang over the padding.
        padded.append(max(size + 2 * pad, (count - 1) * stride + span))
    # Engines hold the padded image: a few bytes of attributes must not ask for all memory.
    if prod(padded) > MAX_VALUE:
        raise ValueError(
            f"the image of {tuple(padded)} with its padding has more than {MAX_VALUE} entries"
        )
    return tuple(counts)


def _linear(attrs: Mapping[str, Any], inputs: Sequence[Shape], weight: Shape | None) -> Shape:
    if len(inputs[0]) != 1:
        raise ValueError(f"input must be (F,), is {inputs[0]}")
    if weight is None or len(weight) != 2 or weight[1] != inputs[0][0]:
        raise ValueError(f"weight must be [O, {inputs[0][0]}], is {weight}")
    return (weight[0],)


def _pool2d(attrs: Mapping[str, Any], inputs: Sequence[Shape], weight: Shape | None) -> Shape:
    channels, *image = _image(inputs[0])
    for kernel, pad in zip(attrs["kernel"], attrs["padding"], strict=True):
        if pad > kernel // 2:
            raise ValueError(f"padding {pad} must be at most half the kernel of {kernel}")
    dilation = attrs.get("dilation", (1, 1))
    return (channels, *_windows(channels, image, attrs["kernel"], attrs, dilation))


def _adaptive(attrs: Mapping[str, Any], inputs: Sequence[Shape], weight: Shape | None) -> Shape:
    return (_image(inputs[0])[0], *attrs["output_size"])


def _add(attrs: Mapping[str, Any], inputs: Sequence[Shape], weight: Shape | None) -> Shape:
    if inputs[0] != inputs[1]:
        raise ValueError(f"inputs must have the same shape, have {inputs[0]} and {inputs[1]}")
    return inputs[0]


def _mul(attrs: Mapping[str, Any], inputs: Sequence[Shape], weight: Shape | None) -> Shape:
    first, second = inputs
    if second != first and not (len(first) == 3 and second == (first[0], 1, 1)):
        raise ValueError(f"second input must be {first} or (C, 1, 1), is {second}")
    return first


def _concat(attrs: Mapping[str, Any], inputs: Sequence[Shape], weight: Shape | None) -> Shape:
    if len({shape[1:] for shape in inputs}) != 1:
        raise ValueError(f"inputs must agree in all but channels, have {list(inputs)}")
    return (sum(shape[0] for shape in inputs), *inputs[0][1:])


def _same(attrs: Mapping[str, Any], inputs: Sequence[Shape], weight: Shape | None) -> Shape:
    return inputs[0]


def _flatten(attrs: Mapping[str, Any], inputs: Sequence[Shape], weight: Shape | None) -> Shape:
    channels, height, width = _image(inputs[0])
    return (channels * height * width,)


def _slice(attrs: Mapping[str, Any], inputs: Sequence[Shape], weight: Shape | None) -> Shape:
    sizes = []
    for size, start, stop, step in zip(
        _image(inputs[0]), attrs["start"], attrs["stop"], attrs["step"], strict=True
    ):
        if not start < stop <= size:
            raise ValueError(f"slice {start}:{stop} must be non-empty and within {size}")
        sizes.append(-((start - stop) // step))
    return tuple(sizes)


def _pad(attrs: Mapping[str, Any], inputs: Sequence[Shape], weight: Shape | None) -> Shape:
    sizes = zip(_image(inputs[0]), attrs["before"], attrs["after"], strict=True)
    return tuple(size + before + after for size, before, after in sizes)


_ACTIVATION = Attr("activation")
_BOOL = Attr("bool")
_SIZES = Attr("ints", 2, minimum=1)
_PADDING = Attr("ints", 2)

OPS: Mapping[str, Op] = {
    "conv2d": Op(
        {
            "stride": _SIZES,
            "padding": _PADDING,
            "dilation": _SIZES,
            "groups": Attr("int", minimum=1),
            "activation": _ACTIVATION,
        },
        inputs=(1, 2),
        infer_shape=_conv2d,
        weighted=True,
    ),
    "linear": Op({"activation": _ACTIVATION}, (1, 1), _linear, weighted=True),
    "max_pool2d": Op(
        {
            "kernel": _SIZES,
            "stride": _SIZES,
            "padding": _PADDING,
            "dilation": _SIZES,
            "ceil_mode": _BOOL,
        },
        (1, 1),
        _pool2d,
    ),
    "avg_pool2d": Op(
        {
            "kernel": _SIZES,
            "stride": _SIZES,
            "padding": _PADDING,
            "ceil_mode": _BOOL,
            "count_include_pad": _BOOL,
        },
        (1, 1),
        _pool2d,
    ),
    "adaptive_avg_pool2d": Op({"output_size": _SIZES}, (1, 1), _adaptive),
    "add": Op({"activation": _ACTIVATION}, (2, 2), _add),
    "mul": Op({}, (2, 2), _mul),
    "concat": Op({}, (2, None), _concat),
    "activation": Op({"activation": _ACTIVATION}, (1, 1), _same),
    "affine": Op({"activation": _ACTIVATION}, (1, 1), _same, vectors=("scale", "shift")),
    "flatten": Op({}, (1, 1), _flatten),
    "slice": Op(
        {"start": Attr("ints", 3), "stop": Attr("ints", 3), "step": Attr("ints", 3, minimum=1)},
        (1, 1),
        _slice,
    ),
    "pad": Op({"before": Attr("ints", 3), "after": Attr("ints", 3)}, (1, 1), _pad),
}

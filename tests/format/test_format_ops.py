"""Shapes and attributes of the operations, against PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from blocksparse.format import ACTIVATIONS, OPS
from blocksparse.format.ops import MAX_DIM

small = st.integers(1, 4)
pairs = st.tuples(small, small)
images = st.tuples(st.integers(1, 9), st.integers(1, 9))


def shape_of(compute):
    """Return the shape PyTorch gives without its batch axis, or None where it refuses."""
    try:
        return tuple(compute().shape[1:])
    except RuntimeError:
        return None


def ours(op, attrs, inputs, weight=None):
    try:
        return OPS[op].infer_shape(attrs, inputs, weight)
    except ValueError:
        return None


@given(images, pairs, pairs, st.tuples(st.integers(0, 3), st.integers(0, 3)), pairs, small, small)
def test_conv2d_shape(image, kernel, stride, padding, dilation, groups, depth):
    weight = (2 * groups, depth, *kernel)
    x = torch.zeros(1, depth * groups, *image)
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    expected = shape_of(
        lambda: F.conv2d(x, torch.zeros(weight), None, stride, padding, dilation, groups)
    )
    assert ours("conv2d", attrs, [tuple(x.shape[1:])], weight) == expected


@given(images, pairs, pairs, st.tuples(st.integers(0, 3), st.integers(0, 3)), pairs, st.booleans())
def test_max_pool2d_shape(image, kernel, stride, padding, dilation, ceil_mode):
    x = torch.zeros(1, 2, *image)
    attrs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    attrs["ceil_mode"] = ceil_mode
    expected = shape_of(lambda: F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode))
    assert ours("max_pool2d", attrs, [(2, *image)]) == expected


@given(images, pairs, pairs, st.tuples(st.integers(0, 2), st.integers(0, 2)), st.booleans())
def test_avg_pool2d_shape(image, kernel, stride, padding, ceil_mode):
    x = torch.zeros(1, 2, *image)
    attrs = {"kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    expected = shape_of(lambda: F.avg_pool2d(x, kernel, stride, padding, ceil_mode))
    assert ours("avg_pool2d", attrs, [(2, *image)]) == expected


@given(st.tuples(*[st.integers(0, 5)] * 3), st.tuples(*[st.integers(0, 8)] * 3), st.data())
def test_slice_shape(start, stop, data):
    shape = (4, 6, 7)
    step = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    got = ours("slice", {"start": start, "stop": stop, "step": step}, [shape])
    if all(a < b <= size for a, b, size in zip(start, stop, shape, strict=True)):
        cut = torch.zeros(shape)[tuple(map(slice, start, stop, step))]
        assert got == tuple(cut.shape)
    else:
        assert got is None


# As much padding as may be: 2**14 rows and columns with it.
WIDE = {"stride": (2**13, 2**13), "padding": (2**13 - 4, 2**13 - 4)}
WIDE |= {"dilation": (1, 1), "groups": 1}


@pytest.mark.parametrize(
    ("op", "attrs", "inputs", "weight", "shape"),
    [
        ("conv2d", WIDE, [(1, 8, 8)], (1, 1, 1, 1), (1, 2, 2)),
        ("linear", {}, [(7,)], (3, 7), (3,)),
        ("adaptive_avg_pool2d", {"output_size": (7, 2)}, [(5, 3, 3)], None, (5, 7, 2)),
        ("add", {}, [(5, 3, 3), (5, 3, 3)], None, (5, 3, 3)),
        ("mul", {}, [(5, 3, 3), (5, 1, 1)], None, (5, 3, 3)),
        ("mul", {}, [(5,), (5,)], None, (5,)),
        ("concat", {}, [(5, 3, 4), (2, 3, 4), (1, 3, 4)], None, (8, 3, 4)),
        ("concat", {}, [(5,), (2,)], None, (7,)),
        ("activation", {}, [(5, 2, 2)], None, (5, 2, 2)),
        ("affine", {}, [(5,)], None, (5,)),
        ("flatten", {}, [(5, 3, 4)], None, (60,)),
        ("pad", {"before": (1, 0, 2), "after": (0, 3, 0)}, [(5, 3, 4)], None, (6, 6, 6)),
    ],
)
def test_shapes(op, attrs, inputs, weight, shape):
    assert OPS[op].infer_shape(attrs, inputs, weight) == shape


FAR = (MAX_DIM, MAX_DIM)
POOL = {"kernel": (2, 2), "stride": FAR, "padding": (0, 0), "ceil_mode": False}
CONV = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


@pytest.mark.parametrize(
    ("op", "attrs", "inputs", "weight", "reason"),
    [
        ("conv2d", CONV, [(3, 4, 4)], (8, 4, 1, 1), "does not fit 3 input channels"),
        ("conv2d", CONV, [(3, 4, 4)], (8, 3), r"weight must be \[K"),
        ("conv2d", CONV, [(3,)], (8, 3, 1, 1), r"input must be \(C, H, W\)"),
        ("conv2d", CONV, [(3, 2, 4)], (8, 3, 3, 3), "window of 3 does not fit"),
        ("conv2d", CONV, [(3, 4, 4), (8, 4, 4)], (8, 3, 3, 3), r"residual .* \(8, 2, 2\)"),
        ("conv2d", CONV | {"groups": 2}, [(4, 4, 4)], (3, 2, 1, 1), "in 2 groups"),
        (
            "conv2d",
            CONV | {"stride": FAR, "padding": FAR},
            [(8, 8, 8)],
            (8, 8, 1, 1),
            r"\(8, 33554440, 33554440\) with its padding has more than 268435456 entries",
        ),
        (
            "avg_pool2d",
            POOL | {"kernel": (2**14, 2**14), "padding": (2**13, 2**13)},
            [(1, 4, 4)],
            None,
            r"\(1, 16388, 16388\) with its padding has more",
        ),
        (
            "max_pool2d",
            POOL | {"dilation": FAR, "ceil_mode": True},
            [(1, 4, 4)],
            None,
            r"\(1, 16777217, 16777217\) with its padding has more",
        ),
        ("linear", {}, [(3, 2, 2)], (5, 12), r"input must be \(F,\)"),
        ("linear", {}, [(12,)], (5, 11), r"weight must be \[O, 12\]"),
        ("add", {}, [(3, 2, 2), (3, 2, 1)], None, "same shape"),
        ("mul", {}, [(3, 2, 2), (1, 1, 1)], None, "second input"),
        ("mul", {}, [(3, 1, 1), (3, 2, 2)], None, "second input"),
        ("concat", {}, [(3, 2, 2), (3, 2, 1)], None, "all but channels"),
        ("flatten", {}, [(3,)], None, r"\(C, H, W\)"),
    ],
)
def test_impossible_shapes_say_why(op, attrs, inputs, weight, reason):
    with pytest.raises(ValueError, match=reason):
        OPS[op].infer_shape(attrs, inputs, weight)


@pytest.mark.parametrize(
    ("op", "key", "good", "bad"),
    [
        ("conv2d", "stride", [(1, 1), (2, 3)], [(0, 1), [1, 1], (1,), (1, 1, 1), (1, 1.0), 1]),
        ("conv2d", "padding", [(0, 0)], [(-1, 0), (True, 0), (MAX_DIM + 1, 0), None]),
        ("conv2d", "groups", [1, 32], [0, True, "1", 1.0, (1,)]),
        ("conv2d", "activation", list(ACTIVATIONS), ["gelu", None, 0, ["relu"]]),
        ("max_pool2d", "ceil_mode", [True, False], [0, 1, "true", None]),
        ("slice", "start", [(0, 0, 0)], [(0, 0), (0, 0, -1)]),
        ("slice", "step", [(1, 2, 3)], [(0, 1, 1)]),
    ],
)
def test_attributes(op, key, good, bad):
    attr = OPS[op].attrs[key]
    for value in good:
        attr.check(value)
    for value in bad:
        with pytest.raises(ValueError, match="must be"):
            attr.check(value)

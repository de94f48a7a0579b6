"""The NumPy reference against its slow twins and PyTorch."""

from __future__ import annotations

from pathlib import Path

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blocksparse.format import (
    ACTIVATIONS,
    OPS,
    BsrWeight,
    DenseWeight,
    Graph,
    Model,
    NMWeight,
    Node,
    ValueSpec,
    check_model,
)
from blocksparse.runtime import load, reference

GOLDEN = Path(__file__).parents[1] / "golden"

EPS = float(np.finfo(np.float32).eps)


def randoms(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def assert_close_dot(got, expected, length, *factors):
    """Compare sums of `length` float32 products, each at most the product of the largest factors.

    A sum of L terms in any order errs by at most L * eps * sum |terms|; random signs keep it near
    the square root of that, so one L and a factor of 4 are generous and still tight.
    """
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    largest = np.prod([np.abs(factor).max() for factor in factors])
    np.testing.assert_allclose(got, expected, rtol=0, atol=4 * EPS * length * largest)


# N, C, H, W, K, R, S, stride, padding, dilation, groups
CONVOLUTIONS = [
    (2, 3, 5, 4, 7, 3, 2, (1, 1), (1, 0), (1, 1), 1),
    (1, 1, 1, 1, 1, 1, 1, (1, 1), (0, 0), (1, 1), 1),
    (3, 5, 1, 1, 2, 3, 3, (1, 1), (1, 1), (1, 1), 1),
    (1, 2, 7, 8, 3, 2, 1, (3, 4), (0, 0), (1, 1), 1),  # stride larger than the kernel
    (1, 2, 9, 8, 3, 3, 2, (2, 1), (2, 3), (2, 3), 1),
    (2, 6, 5, 6, 4, 3, 3, (2, 2), (1, 1), (1, 1), 2),
    (1, 4, 6, 5, 4, 3, 3, (1, 1), (1, 1), (1, 1), 4),  # depthwise
    (1, 3, 4, 4, 9, 3, 3, (1, 1), (2, 2), (2, 2), 3),  # depthwise, three filters a channel
    (1, 2, 2, 3, 2, 4, 5, (1, 2), (3, 3), (1, 1), 1),  # kernel larger than the image
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_conv2d(case, with_bias):
    n, c, h, w, k, r, s, stride, padding, dilation, groups = case
    x, weight = randoms(n, c, h, w), randoms(k, c // groups, r, s)
    bias = randoms(k) if with_bias else None
    got = reference.conv2d(x, weight, bias, stride, padding, dilation, groups)
    length = c // groups * r * s + 1
    twin = naive.conv2d(x, weight, bias, stride, padding, dilation, groups)
    assert_close_dot(got, twin, length, x, weight)
    args = [None if a is None else torch.from_numpy(a) for a in (x, weight, bias)]
    theirs = F.conv2d(*args, stride, padding, dilation, groups).numpy()
    assert_close_dot(got, theirs, length, x, weight)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 33, 4)])
def test_linear(shape):
    n, f, o = shape
    x, weight, bias = randoms(n, f), randoms(o, f), randoms(o)
    twin = naive.linear(x, weight, bias)
    assert_close_dot(reference.linear(x, weight, bias), twin, f + 1, x, weight)
    assert_close_dot(reference.linear(x, weight, None), twin - bias, f, x, weight)


# H, W, kernel, stride, padding, dilation, ceil_mode
POOLS = [
    (6, 7, (2, 3), (2, 3), (0, 0), (1, 1), False),
    (1, 1, (1, 1), (1, 1), (0, 0), (1, 1), True),
    (7, 8, (3, 3), (2, 2), (1, 1), (1, 1), False),
    (7, 8, (3, 3), (2, 2), (0, 0), (1, 1), True),
    (5, 6, (3, 2), (4, 3), (1, 1), (1, 1), True),
    (9, 8, (2, 1), (3, 5), (1, 0), (1, 1), True),  # stride larger than the kernel
    (2, 2, (3, 3), (2, 2), (0, 0), (1, 1), True),  # window larger than the image
    (8, 9, (3, 2), (1, 2), (1, 1), (2, 3), False),
    (6, 9, (2, 4), (3, 2), (1, 2), (3, 2), True),
    (2, 2, (2, 2), (1, 1), (1, 1), (3, 3), False),  # windows that meet only padding
]


@pytest.mark.parametrize("case", POOLS, ids=str)
def test_max_pool2d(case):
    h, w, kernel, stride, padding, dilation, ceil_mode = case
    x = randoms(2, 3, h, w)
    x[0, 0, 0, 0], x[1, 2, -1, -1], x[0, 1] = np.nan, np.inf, -np.inf
    attrs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    attrs["ceil_mode"] = ceil_mode
    size = OPS["max_pool2d"].infer_shape(attrs, [(3, h, w)], None)[1:]
    got = reference.max_pool2d(x, kernel, stride, padding, dilation, size)
    assert got.dtype == np.float32
    twin = naive.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    np.testing.assert_array_equal(got, twin)
    theirs = F.max_pool2d(torch.from_numpy(x), kernel, stride, padding, dilation, ceil_mode)
    np.testing.assert_array_equal(got, theirs.numpy())


@pytest.mark.parametrize("case", [pool for pool in POOLS if pool[5] == (1, 1)], ids=str)
@pytest.mark.parametrize("include", [True, False])
def test_avg_pool2d(case, include):
    h, w, kernel, stride, padding, _, ceil_mode = case
    x = randoms(2, 3, h, w)
    attrs = {"kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    size = OPS["avg_pool2d"].infer_shape(attrs, [(3, h, w)], None)[1:]
    got = reference.avg_pool2d(x, kernel, stride, padding, size, include)
    length = kernel[0] * kernel[1]
    twin = naive.avg_pool2d(x, kernel, stride, padding, ceil_mode, include)
    assert_close_dot(got, twin, length, x)
    theirs = F.avg_pool2d(torch.from_numpy(x), kernel, stride, padding, ceil_mode, include)
    assert_close_dot(got, theirs.numpy(), length, x)


@pytest.mark.parametrize("image", [(1, 1), (7, 5), (6, 6), (3, 10)])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (5, 1)])
def test_adaptive_avg_pool2d(image, size):
    x = randoms(2, 3, *image)
    got = reference.adaptive_avg_pool2d(x, size)
    length = image[0] * image[1]
    assert_close_dot(got, naive.adaptive_avg_pool2d(x, size), length, x)
    assert_close_dot(got, F.adaptive_avg_pool2d(torch.from_numpy(x), size).numpy(), length, x)


def test_average_keeps_infinity_where_it_is():
    x = randoms(1, 2, 8, 5)  # rows 0:3, 2:6 and 5:8: a pixel just behind a shorter window
    x[0, 0, 3, 2], x[0, 1, 0, 0] = np.inf, np.nan
    for got, expected in [
        (
            reference.adaptive_avg_pool2d(x, (3, 2)),
            F.adaptive_avg_pool2d(torch.from_numpy(x), (3, 2)),
        ),
        (
            reference.avg_pool2d(x, (3, 3), (2, 2), (1, 1), (4, 3), True),
            F.avg_pool2d(torch.from_numpy(x), 3, 2, 1),
        ),
    ]:
        assert 0 < np.isfinite(got).sum() < got.size
        np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-6)


TORCH_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    special = [0.0, -0.0, 3, -3, 6, 1e-40, 88, -88, 104, -104, 1e30, -1e30, np.inf, -np.inf, np.nan]
    x = np.array([*special, *np.linspace(-9, 9, 101)], np.float32)
    with np.errstate(all="ignore"):
        got = reference.activate(x, activation)
    assert got.dtype == np.float32
    expected = TORCH_ACTIVATIONS[activation](torch.from_numpy(x)).numpy()
    # A handful of roundings, plus what exp gives below the normal numbers.
    np.testing.assert_allclose(got, expected, rtol=8 * EPS, atol=1e-37)


def test_conv2d_passes_nan_and_infinity():
    x, weight = randoms(1, 2, 6, 6), randoms(3, 2, 3, 3)
    x[0, 0, 1, 1], x[0, 1, 4, 5] = np.nan, np.inf
    weight[1, 1] = 0  # infinity times zero is NaN
    with np.errstate(invalid="ignore"):
        got = reference.conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1)
    expected = F.conv2d(torch.from_numpy(x), torch.from_numpy(weight), padding=1).numpy()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
    assert np.isfinite(got).any()


def run_nodes(input_shape, *nodes, weights=None, vectors=None, batch=2):
    graph = Graph((ValueSpec("x", input_shape),), (nodes[-1].name,), nodes)
    model = Model(graph, weights or {}, vectors or {})
    check_model(model)
    x = randoms(batch, *input_shape)
    before = x.copy()
    out = reference.run(model, x)
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(x, before)
    return x, out


@pytest.mark.parametrize("layout", ["dense", "bsr", "nm"])
def test_run_conv2d_with_residual_and_linear(layout):
    weight, head = randoms(5, 5, 3, 3), randoms(3, 100)
    weight[:, 1::3] = head[:, 1::3] = 0
    pack = {
        "dense": DenseWeight.from_dense,
        "bsr": lambda w: BsrWeight.from_dense(w, (2, 1)),
        "nm": lambda w: NMWeight.from_dense(w, 2, 3),
    }[layout]
    attrs = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    bias = randoms(5)
    x, out = run_nodes(
        (5, 4, 5),
        Node("conv", "conv2d", ("x", "x"), attrs | {"activation": "relu"}, (5, 4, 5)),
        Node("flat", "flatten", ("conv",), {}, (100,)),
        Node("head", "linear", ("flat",), {"activation": "none"}, (3,)),
        weights={"conv": pack(weight), "head": pack(head)},
        vectors={"conv.bias": bias},
    )
    hidden = np.maximum(naive.conv2d(x, weight, bias, padding=1) + x, 0)
    twin = naive.linear(hidden.reshape(2, 100), head)
    assert_close_dot(out, twin, 100 + 46, hidden, head)


def test_run_takes_one_value_several_times():
    weight = randoms(2, 2, 1, 1)
    attrs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    x, out = run_nodes(
        (2, 3, 4),
        Node("conv", "conv2d", ("x",), attrs | {"activation": "none"}, (2, 3, 4)),
        Node("both", "concat", ("conv", "x", "conv"), {}, (6, 3, 4)),
        Node("twice", "add", ("both", "both"), {"activation": "relu6"}, (6, 3, 4)),
        weights={"conv": DenseWeight(weight)},
    )
    conv = naive.conv2d(x, weight)
    expected = np.clip(2 * np.concatenate([conv, x, conv], axis=1), 0, 6)
    assert_close_dot(out, expected, 2, x, weight)


def test_run_gates_and_scales_channels():
    scale, shift = randoms(3), randoms(3, seed=1)
    x, out = run_nodes(
        (3, 4, 5),
        Node("norm", "affine", ("x",), {"activation": "relu"}, (3, 4, 5)),
        Node("gate", "adaptive_avg_pool2d", ("x",), {"output_size": (1, 1)}, (3, 1, 1)),
        Node("squash", "activation", ("gate",), {"activation": "sigmoid"}, (3, 1, 1)),
        Node("scaled", "mul", ("norm", "squash"), {}, (3, 4, 5)),
        vectors={"norm.scale": scale, "norm.shift": shift},
    )
    normed = np.maximum(x * scale[:, None, None] + shift[:, None, None], 0)
    gate = 1 / (1 + np.exp(-naive.adaptive_avg_pool2d(x, 1)))
    assert_close_dot(out, normed * gate, 20, normed)


def test_run_affine_on_a_vector():
    scale, shift = randoms(6), randoms(6, seed=1)
    x, out = run_nodes(
        (3, 1, 2),
        Node("flat", "flatten", ("x",), {}, (6,)),
        Node("norm", "affine", ("flat",), {"activation": "none"}, (6,)),
        vectors={"norm.scale": scale, "norm.shift": shift},
    )
    np.testing.assert_array_equal(out, x.reshape(2, 6) * scale + shift)


def test_run_slices_and_pads():
    x, out = run_nodes(
        (3, 6, 7),
        Node(
            "cut",
            "slice",
            ("x",),
            {"start": (0, 1, 0), "stop": (3, 6, 7), "step": (2, 2, 3)},
            (2, 3, 3),
        ),
        Node("wide", "pad", ("cut",), {"before": (1, 0, 2), "after": (0, 3, 0)}, (3, 6, 5)),
    )
    expected = np.zeros((2, 3, 6, 5), np.float32)
    expected[:, 1:, :3, 2:] = x[:, ::2, 1::2, ::3]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("op", ["max_pool2d", "avg_pool2d"])
def test_run_pools(op):
    attrs = {"kernel": (3, 2), "stride": (2, 3), "padding": (1, 0), "ceil_mode": True}
    attrs |= {"dilation": (1, 1)} if op == "max_pool2d" else {"count_include_pad": False}
    x, out = run_nodes((2, 6, 7), Node("pool", op, ("x",), attrs, (2, 4, 3)))
    args = ((3, 2), (2, 3), (1, 0))
    if op == "max_pool2d":
        twin = naive.max_pool2d(x, *args, ceil_mode=True)
    else:
        twin = naive.avg_pool2d(x, *args, ceil_mode=True, count_include_pad=False)
    assert_close_dot(out, twin, 6, x)


def golden_network():
    return load(GOLDEN / "v1.bsr.safetensors", engine="reference")


def test_an_empty_batch_gives_an_empty_answer():
    network = golden_network()
    out = network(np.zeros((0, *network.input_shape), np.float32))
    assert out.shape == (0, 4)
    assert out.dtype == np.float32


def test_images_of_a_batch_do_not_meet():
    network = golden_network()
    x = randoms(3, *network.input_shape)
    each = np.concatenate([network(image[None]) for image in x])
    np.testing.assert_allclose(network(x), each, rtol=1e-5)
    assert len(np.unique(each)) == each.size


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (np.zeros((2, 3, 8, 9), np.float32), r"\(N, 3, 9, 8\).*\(2, 3, 8, 9\)"),
        (np.zeros((3, 9, 8), np.float32), r"\(N, 3, 9, 8\).*\(3, 9, 8\)"),
        (np.zeros((1, 3, 9, 8)), "float32.*float64"),
        (np.zeros((1, 3, 9, 8), np.uint8), "float32.*uint8"),
    ],
)
def test_wrong_input_is_told_what_is_right(x, reason):
    with pytest.raises(ValueError, match=reason):
        golden_network()(x)


def test_every_operation_has_a_reference():
    assert set(reference._OPS) == set(OPS)

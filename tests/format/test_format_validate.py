"""Every rule of graph, tensors and numbers, each broken once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from craft import CONV, small_model

from blocksparse.format import (
    BsrWeight,
    DenseWeight,
    FormatError,
    Graph,
    Model,
    NMWeight,
    Node,
    ValueSpec,
    check_model,
)


def test_a_sound_model():
    check_model(small_model())


def refuse(model: Model, tensor: str | None, rule: str) -> None:
    with pytest.raises(FormatError, match=rule) as error:
        check_model(model)
    assert error.value.tensor == tensor
    assert tensor is None or tensor in str(error.value)


def with_node(index: int, **changed) -> Model:
    """Return the small model with fields of one node replaced."""
    model = small_model()
    nodes = list(model.graph.nodes)
    nodes[index] = replace(nodes[index], **changed)
    return replace(model, graph=replace(model.graph, nodes=tuple(nodes)))


STEM, NORM, BODY, FLAT, HEAD = range(5)


@pytest.mark.parametrize(
    ("node", "changed", "tensor", "rule"),
    [
        (NORM, {"name": "stem"}, "stem", "name is used twice"),
        (STEM, {"name": "x"}, "x", "name is used twice"),
        (FLAT, {"name": ""}, None, "printable characters"),
        (FLAT, {"name": "a\nb"}, None, "printable characters"),
        (FLAT, {"name": "f" * 257}, None, "printable characters"),
        (NORM, {"inputs": ("body",)}, "norm", "'body' is not defined before"),
        (NORM, {"inputs": ("norm",)}, "norm", "'norm' is not defined before"),
        (NORM, {"inputs": ()}, "norm", "must have 1 to 1 inputs"),
        (NORM, {"inputs": ("stem", "stem")}, "norm", "must have 1 to 1 inputs"),
        (NORM, {"op": "gelu"}, "norm", "op is unknown; version 1 has conv2d"),
        (NORM, {"attrs": {}}, "norm", r"attributes must be \['activation'\], are \[\]"),
        (NORM, {"attrs": {"activation": "relu", "more": 1}}, "norm", "attributes must be"),
        (NORM, {"attrs": {"activation": "gelu"}}, "norm", "activation must be one of none"),
        (STEM, {"attrs": CONV | {"stride": (0, 1)}}, "stem", "stride must be 2 integers from 1"),
        (STEM, {"attrs": CONV | {"stride": [1, 1]}}, "stem", "stride must be 2 integers"),
        (STEM, {"attrs": CONV | {"groups": 3}}, "stem", "does not fit 3 input channels"),
        (BODY, {"attrs": CONV | {"groups": 2}}, "body", "nm layout needs groups 1; store it dense"),
        (NORM, {"shape": (8, 6, 6)}, "norm", r"shape must be \(8, 6, 5\), is \(8, 6, 6\)"),
        (NORM, {"shape": (np.int64(8), 6, 5)}, "norm", "sizes must be integers"),
        (HEAD, {"op": "activation"}, "head", "must not have a weight"),
        (FLAT, {"op": "linear", "attrs": {"activation": "none"}}, "flat", "must have a weight"),
        (BODY, {"inputs": ("norm", "stem")}, "body", "residual must have the output's shape"),
    ],
)
def test_nodes(node, changed, tensor, rule):
    refuse(with_node(node, **changed), tensor, rule)


def graph_model(*nodes, shape=(3, 4, 4), outputs=None, inputs=None):
    inputs = (ValueSpec("x", shape),) if inputs is None else inputs
    return Model(Graph(inputs, outputs or (nodes[-1].name,), nodes), {}, {})


def test_a_small_file_cannot_ask_for_a_huge_padded_image():
    far = (2**24, 2**24)
    conv = Node("c", "conv2d", ("x",), CONV | {"stride": far, "padding": far}, (8, 3, 3))
    weights = {"c": DenseWeight(np.ones((8, 8, 1, 1), np.float32))}
    model = replace(graph_model(conv, shape=(8, 8, 8)), weights=weights)
    refuse(model, "c", "conv2d: .* with its padding has more than 268435456 entries")


ACT = Node("act", "activation", ("x",), {"activation": "relu"}, (3, 4, 4))


@pytest.mark.parametrize(
    ("model", "tensor", "rule"),
    [
        (graph_model(ACT, inputs=()), None, "one input and one output, has 0 and 1"),
        (graph_model(ACT, outputs=("act", "act")), None, "has 1 and 2"),
        (graph_model(ACT, outputs=("x",)), "x", "output must be a node"),
        (graph_model(ACT, outputs=("y",)), "y", "output must be a node"),
        (graph_model(ACT, shape=(3,)), "x", r"input shape must be \(C, H, W\)"),
        (graph_model(ACT, shape=(3, 0, 4)), "x", "sizes must be integers of 1 to"),
        (graph_model(ACT, shape=(3, 2**25, 4)), "x", "sizes must be integers of 1 to"),
        (graph_model(ACT, shape=(2**10, 2**10, 2**10)), "x", "more than 268435456 entries"),
        (
            graph_model(
                Node("p", "pad", ("x",), {"before": (0, 2**24, 0), "after": (0, 0, 0)}, ()),
            ),
            "p",
            "shape must be",
        ),
        (
            graph_model(
                Node(
                    "p",
                    "pad",
                    ("x",),
                    {"before": (0, 2**23, 2**23), "after": (0, 0, 0)},
                    (3, 2**23 + 4, 2**23 + 4),
                ),
            ),
            "p",
            "more than 268435456 entries",
        ),
    ],
)
def test_graphs(model, tensor, rule):
    refuse(model, tensor, rule)


def test_a_weight_of_no_node():
    model = small_model()
    weights = {**model.weights, "gone": DenseWeight(np.ones((2, 2), np.float32))}
    refuse(replace(model, weights=weights), "gone", "belongs to no node")


def with_vector(name, array):
    model = small_model()
    vectors = {**model.vectors, name: array}
    return replace(model, vectors={k: v for k, v in vectors.items() if v is not None})


NAN = np.array([0, 1, 2, np.nan], np.float32)


@pytest.mark.parametrize(
    ("name", "array", "rule"),
    [
        ("norm.scale", None, "tensor is missing"),
        ("body.scale", np.ones(6, np.float32), "belongs to no node"),
        ("head.weight.data", np.ones(6, np.float32), "belongs to no node"),
        ("norm.bias", np.ones(8, np.float32), "belongs to no node"),
        ("head.bias", np.zeros(5, np.float32), r"shape must be \[4\], is \[5\]"),
        ("head.bias", np.zeros((4, 1), np.float32), r"shape must be \[4\], is \[4, 1\]"),
        ("head.bias", np.zeros(4), "dtype must be float32, int32 or uint8, is float64"),
        ("head.bias", np.zeros(4, np.int32), "dtype must be F32, is I32"),
        ("head.bias", np.zeros(8, np.float32)[::2], "C-contiguous"),
        ("head.bias", NAN, r"finite, \(3,\) is nan"),
        ("norm.shift", -np.float32(np.inf) * np.ones(8, np.float32), "finite, .* is -inf"),
    ],
)
def test_vectors(name, array, rule):
    refuse(with_vector(name, array), name, rule)


def test_a_bias_is_optional():
    check_model(with_vector("head.bias", None))


def with_weight(name, weight):
    model = small_model()
    return replace(model, weights={**model.weights, name: weight})


def test_dense_values_must_be_finite():
    values = np.ones((8, 3, 3, 3), np.float32)
    values[7, 2, 1, 0] = np.inf
    refuse(with_weight("stem", DenseWeight(values)), "stem.weight", r"\(7, 2, 1, 0\) is inf")


def ints(*values):
    return np.array(values, np.int32)


# A head of 4 x 180 in blocks of 3 x 8: two block rows of 23 block columns, both edges ragged.
BLOCKS = np.zeros((3, 3, 8), np.float32)
BLOCKS[:, 0, 0] = 1
HEAD_BSR = BsrWeight((4, 180), (3, 8), BLOCKS, ints(0, 22, 5), ints(0, 2, 3))


def blocks(at, value=1.0):
    data = BLOCKS.copy()
    data[at] = value
    return data


def test_the_bsr_weight_all_cases_start_from():
    check_model(with_weight("head", HEAD_BSR))


@pytest.mark.parametrize(
    ("changed", "tensor", "rule"),
    [
        ({"indptr": ints(1, 2, 3)}, "indptr", "rise from 0 to the number of blocks 3"),
        ({"indptr": ints(0, 2, 2)}, "indptr", "rise from 0"),
        ({"indptr": ints(0, 4, 3)}, "indptr", "rise from 0"),
        ({"indptr": ints(0, -(2**31), 3)}, "indptr", "rise from 0"),
        ({"indptr": ints(0, 3)}, "indptr", r"shape must be \[3\], is \[2\]"),
        ({"indptr": np.array([0, 2, 3])}, "indptr", "dtype must be float32, int32"),
        ({"indices": ints(0, 22)}, "indices", "one entry per block: 3 blocks, 2 indices"),
        ({"indices": ints(-1, 22, 5)}, "indices", "lie in 0 to 22"),
        ({"indices": ints(0, 23, 5)}, "indices", "lie in 0 to 22"),
        ({"indices": ints(22, 0, 5)}, "indices", "strictly within each block row, do not in row 0"),
        ({"indices": ints(4, 4, 5)}, "indices", "do not in row 0"),
        ({"indptr": ints(0, 1, 3), "indices": ints(7, 5, 5)}, "indices", "do not in row 1"),
        ({"indptr": ints(0, 0, 3), "indices": ints(5, 7, 6)}, "indices", "do not in row 1"),
        ({"data": blocks((1, 0, 0), 0)}, "data", "block 1 is all zero; leave it out"),
        ({"data": blocks((2, 1, 0))}, "data", r"outside the weight \(4, 180\) must be 0.0"),
        ({"data": blocks((1, 0, 4))}, "data", "outside the weight"),
        ({"data": blocks((0, 2, 7), np.nan)}, "data", r"finite, \(0, 2, 7\) is nan"),
        ({"data": BLOCKS[:, :, :7].copy()}, "data", r"shape must be \[any, 3, 8\]"),
        ({"data": np.asfortranarray(BLOCKS)}, "data", "C-contiguous"),
        ({"data": BLOCKS.astype(np.float64)}, "data", "is float64"),
    ],
)
def test_bsr(changed, tensor, rule):
    weight = replace(HEAD_BSR, **changed)
    refuse(with_weight("head", weight), f"head.weight.{tensor}", rule)


@pytest.mark.parametrize(
    "changed",
    [
        {"data": blocks((0, 2, 7))},  # an inner block may be full
        {"data": blocks((1, 2, 3))},  # the last real column of the right edge
        {"indptr": ints(0, 1, 3), "indices": ints(7, 5, 6)},  # falls between rows
        {"indptr": ints(0, 0, 3), "indices": ints(1, 2, 3)},  # an empty row
        {"indptr": ints(0, 0, 0), "indices": ints(), "data": np.zeros((0, 3, 8), np.float32)},
    ],
)
def test_bsr_that_looks_odd_and_is_sound(changed):
    check_model(with_weight("head", replace(HEAD_BSR, **changed)))


def test_bsr_right_edge_of_every_kernel_position():
    model = small_model()
    array = np.ones((6, 8, 3, 3), np.float32)
    weight = BsrWeight.from_dense(array, (4, 3))
    check_model(replace(model, weights={**model.weights, "body": weight}))
    data = weight.data.copy()
    data[3 * 4 + 2, 0, 2] = 1  # block row 0, position 4, third of three channel blocks
    broken = replace(weight, data=data)
    refuse(
        replace(model, weights={**model.weights, "body": broken}),
        "body.weight.data",
        "outside the weight",
    )


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"shape": (4, 180, 1)}, "2 or 4 sizes of 1 to"),
        ({"shape": (0, 180)}, "2 or 4 sizes of 1 to"),
        ({"shape": (2**24, 180)}, "at most 268435456 are allowed"),
        ({"block": (0, 8)}, "block must be two positive sizes"),
        ({"block": (3, 8, 1)}, "block must be two positive sizes"),
        ({"block": (2**20, 2**20)}, "at most 268435456 are allowed"),
        ({"shape": (4, 90)}, "weight must be"),
    ],
)
def test_layouts(changed, rule):
    refuse(with_weight("head", replace(HEAD_BSR, **changed)), "head", rule)


# A body of 6 x 8 x 3 x 3 in 2:5: two groups, of 5 and 3 channels; 36 fields of 4 bits a row. With
# one value for all of a row, each group holds it at index 1 and repeats the index.
def body_nm():
    values = np.zeros((6, 9, 2, 2), np.float32)
    values[..., 0] = 1
    return NMWeight((6, 8, 3, 3), 2, 5, values, np.full((6, 18), 0x11, np.uint8))


def test_the_nm_weight_all_cases_start_from():
    check_model(with_weight("body", body_nm()))


@pytest.mark.parametrize(
    ("at", "byte", "rule"),
    [
        ((5, 0), 0x51, "below the channels of the group: 5, and 3 in the last group"),
        ((0, 17), 0x31, "below the channels of the group: 5, and 3 in the last group"),
        ((2, 4), 0x01, "must not decrease"),
    ],
)
def test_nm_indices(at, byte, rule):
    weight = body_nm()
    weight.indices[at] = byte
    refuse(with_weight("body", weight), "body.weight.indices", rule)


def test_nm_indices_up_to_the_last_channel():
    weight = body_nm()
    weight.indices[:, ::2], weight.indices[:, 1::2] = 0x43, 0x21
    weight.values[...] = 1
    check_model(with_weight("body", weight))


def test_nm_repeats_hold_nothing():
    weight = body_nm()
    weight.values[3, 8, 1, 1] = 2
    refuse(with_weight("body", weight), "body.weight.values", "only the first value")


def test_nm_spare_bits_are_zero():
    array = np.zeros((6, 8, 3, 3), np.float32)
    weight = NMWeight.from_dense(array, 1, 8)  # nine fields of four bits: half a byte to spare
    check_model(with_weight("body", weight))
    weight.indices[4, -1] |= 0x10
    refuse(with_weight("body", weight), "body.weight.indices", "spare bits must be 0")


@pytest.mark.parametrize(
    ("changed", "tensor", "rule"),
    [
        ({"n": 6}, "body", "1 <= n <= m <= 256"),
        ({"n": 0}, "body", "1 <= n <= m <= 256"),
        ({"m": 257}, "body", "1 <= n <= m <= 256"),
        ({"m": 4}, "body.weight.indices", r"shape must be \[6, 9\], is \[6, 18\]"),
        ({"n": 1}, "body.weight.", "shape must be"),
    ],
)
def test_nm_sizes(changed, tensor, rule):
    with pytest.raises(FormatError, match=rule) as error:
        check_model(with_weight("body", replace(body_nm(), **changed)))
    assert error.value.tensor.startswith(tensor)

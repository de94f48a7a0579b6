from __future__ import annotations

import numpy as np
import pytest

from blocksparse.format import BsrWeight, DenseWeight, Graph, Model, NMWeight, Node, ValueSpec
from blocksparse.perf.cost import cost, stored_weights, total


def naive_stored(dense, block):
    """Count, entry by entry, the real entries of blocks that are not all zero."""
    k, c = dense.shape[:2]
    taps = dense.reshape(k, c, -1)
    r, s = block
    count = 0
    for i in range(k):
        for j in range(c):
            for tap in range(taps.shape[2]):
                rows = slice(i // r * r, i // r * r + r)
                columns = slice(j // s * s, j // s * s + s)
                count += bool((taps[rows, columns, tap] != 0).any())
    return count


@pytest.mark.parametrize("shape", [(8, 8, 1, 1), (5, 7, 3, 2), (9, 3, 3, 3), (11, 20)])
@pytest.mark.parametrize("block", [(8, 8), (4, 2), (1, 1), (3, 16)])
def test_stored_block_weights_are_those_inside_the_shape(shape, block):
    dense = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    dense[np.random.default_rng(1).random(shape) < 0.9] = 0
    assert stored_weights(BsrWeight.from_dense(dense, block)) == naive_stored(dense, block)


def test_stored_block_weights_of_an_empty_layer():
    assert stored_weights(BsrWeight.from_dense(np.zeros((5, 6, 3, 3)), (4, 4))) == 0


@pytest.mark.parametrize(
    ("channels", "per_row"), [(8, 4), (9, 5), (10, 6), (11, 6), (2, 2), (1, 1)]
)
def test_stored_group_weights_end_with_the_channels(channels, per_row):
    weight = NMWeight.from_dense(np.zeros((3, channels, 2, 2)), 2, 4)
    assert stored_weights(weight) == 3 * 4 * per_row


def conv(name, source, shape, groups=1):
    attrs = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    return Node(name, "conv2d", (source,), {**attrs, "groups": groups, "activation": "relu"}, shape)


def model():
    """3 channels 9x9 -> block-sparse conv -> depthwise conv -> affine -> flatten -> 2:4 linear."""
    random = np.random.default_rng(0)
    sparse = np.zeros((8, 3, 3, 3), np.float32)
    sparse[:4, :2, 0, 0] = 1  # one block of 4x2, of 2 x 2 x 9 blocks (the second column ragged)
    groups = random.standard_normal((5, 8 * 9)).astype(np.float32)
    groups.reshape(5, -1, 4)[:, :, 2:] = 0
    nodes = (
        conv("a", "x", (8, 5, 5)),
        conv("b", "a", (8, 3, 3), groups=8),
        Node("c", "affine", ("b",), {"activation": "none"}, (8, 3, 3)),
        Node("d", "flatten", ("c",), {}, (72,)),
        Node("e", "linear", ("d",), {"activation": "none"}, (5,)),
    )
    vectors = {"a.bias": 8, "c.scale": 8, "c.shift": 8, "e.bias": 5}
    return Model(
        graph=Graph((ValueSpec("x", (3, 9, 9)),), ("e",), nodes),
        weights={
            "a": BsrWeight.from_dense(sparse, (4, 2)),
            "b": DenseWeight.from_dense(random.standard_normal((8, 1, 3, 3))),
            "e": NMWeight.from_dense(groups, 2, 4),
        },
        vectors={name: np.ones(size, np.float32) for name, size in vectors.items()},
    )


def test_every_node_by_hand():
    a, b, c, d, e = cost(model())
    assert (a.parameters_dense, a.parameters_kept) == (8 * 3 * 9 + 8, 8 + 8)
    assert (a.macs_dense, a.macs_kept) == (8 * 3 * 9 * 25, 8 * 25)
    assert (b.parameters_dense, b.parameters_kept) == (72, 72)
    assert (b.macs_dense, b.macs_kept) == (72 * 9, 72 * 9)
    assert (c.parameters_dense, c.parameters_kept, c.macs_dense, c.macs_kept) == (16, 16, 0, 0)
    assert (d.parameters_dense, d.parameters_kept, d.macs_dense, d.macs_kept) == (0, 0, 0, 0)
    assert (e.parameters_dense, e.parameters_kept) == (5 * 72 + 5, 5 * 36 + 5)
    assert (e.macs_dense, e.macs_kept) == (360, 180)
    assert e.flops_dense == 720


def test_totals_are_sums():
    rows = cost(model())
    sums = total(rows)
    assert sums.macs_kept == sum(row.macs_kept for row in rows)
    assert sums.flops_dense == 2 * sum(row.macs_dense for row in rows)
    assert sums.parameter_density == sums.parameters_kept / sums.parameters_dense
    assert 0 < sums.flop_density < 1
    assert total([]).flop_density == 1.0

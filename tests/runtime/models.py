"""Small models for the runtime's tests: one layer of any kind, or a few that meet."""

from __future__ import annotations

import numpy as np

from blocksparse.format import (
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

POOL = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "ceil_mode": False}


def randoms(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def block_zeros(dense, block, density, seed=0):
    """Zero whole blocks of `dense`, every kernel position by itself."""
    k, c = dense.shape[:2]
    rows, columns = -(-k // block[0]), -(-c // block[1])
    rng = np.random.default_rng([seed, k, c])
    keep = rng.random((rows, columns, *dense.shape[2:])) < density
    mask = keep.repeat(block[0], axis=0).repeat(block[1], axis=1)[:k, :c]
    return dense * mask.astype(np.float32)


def nm_zeros(dense, n, m):
    """Keep the n largest of every m input channels of `dense`."""
    out = np.zeros_like(dense)
    for start in range(0, dense.shape[1], m):
        group = dense[:, start : start + m]
        rank = np.argsort(np.argsort(-np.abs(group), axis=1), axis=1)
        out[:, start : start + m] = np.where(rank < n, group, 0)
    return out


def make_weight(shape, layout, seed=0):
    """A weight in a layout: "dense", ("bsr", (r, c), density) or ("nm", n, m)."""
    dense = randoms(*shape, seed=seed)
    if layout == "dense":
        return DenseWeight.from_dense(dense)
    if layout[0] == "bsr":
        return BsrWeight.from_dense(block_zeros(dense, layout[1], layout[2], seed), layout[1])
    return NMWeight.from_dense(nm_zeros(dense, *layout[1:]), *layout[1:])


class Builder:
    """Adds nodes one after the other; each method returns the new value's name."""

    def __init__(self, shape):
        self.shape = shape
        self.nodes, self.weights, self.vectors = [], {}, {}
        self.shapes = {"x": shape}

    def node(self, op, *inputs, weight=None, bias=True, **attrs):
        name = f"{op}{len(self.nodes)}"
        shapes = [self.shapes[i] for i in inputs]
        shape = OPS[op].infer_shape(attrs, shapes, None if weight is None else weight.shape)
        self.nodes.append(Node(name, op, inputs, attrs, shape))
        self.shapes[name] = shape
        if weight is not None:
            self.weights[name] = weight
            if bias:
                self.vectors[f"{name}.bias"] = randoms(weight.shape[0], seed=7)
        if op == "affine":
            for part in ("scale", "shift"):
                self.vectors[f"{name}.{part}"] = randoms(shape[0], seed=len(part))
        return name

    def conv(
        self, x, k, kernel=(3, 3), layout="dense", stride=(1, 1), padding=(1, 1), dilation=(1, 1),
        groups=1, activation="relu", residual=None, seed=0, bias=True,
    ):  # fmt: skip
        weight = make_weight((k, self.shapes[x][0] // groups, *kernel), layout, seed)
        inputs = (x,) if residual is None else (x, residual)
        return self.node(
            "conv2d", *inputs, weight=weight, bias=bias, stride=stride, padding=padding,
            dilation=dilation, groups=groups, activation=activation,
        )  # fmt: skip

    def linear(self, x, features, layout="dense", activation="none", seed=0, bias=True):
        weight = make_weight((features, self.shapes[x][0]), layout, seed)
        return self.node("linear", x, weight=weight, bias=bias, activation=activation)

    def model(self):
        graph = Graph((ValueSpec("x", self.shape),), (self.nodes[-1].name,), tuple(self.nodes))
        model = Model(graph, self.weights, self.vectors)
        check_model(model)
        return model

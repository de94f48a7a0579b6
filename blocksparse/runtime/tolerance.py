"""How far two engines may differ on the same model: what float32 rounding explains, and no more."""

# L length of a dot product

from __future__ import annotations

from math import prod, sqrt

import numpy as np

from blocksparse.format import Model, Node

from . import winograd

TILES_ERROR = 3
"""Error of F(4x4, 3x3) over that of direct sums, measured; see `kernels.winograd_matrices`."""

LINE_ERROR = {3: 1.4, 4: 2.3, 5: 2.1, 7: 2.1}
"""The same for F(m, r) down the columns or along the rows, by taps."""


def tolerance(model: Model, max_logit: float) -> float:
    """Largest difference of two logits that float32 rounding explains.

    A dot product of length L summed in float32, in any order, is off by about ``eps * sqrt(L)``
    relative to the scale of its result: rounding errors walk randomly (Higham, *Accuracy and
    Stability of Numerical Algorithms*, 2nd ed., section 2.8). Errors of successive layers are
    independent and reach the logits with a gain of about one relative to the values they are part
    of, so they add in quadrature, which is a walk as long as all dot products on the path together.
    Two programs err, and batch norm and residual adds cancel: a factor of 4::

        4 * eps * max_logit * sqrt(max over paths of sum(L)) + tiny

    with eps = 2**-23, tiny the smallest normal number (what is below is flushed to zero), L the
    length of a convolution's or linear layer's dot products (C/groups * kh * kw, F), the window of
    an average pool, 2 for other arithmetic and 0 where values only move. A convolution that may run
    through Winograd's transforms errs up to 3 times as much: in quadrature, it counts as up to 9
    times as long.

    The scale is that of the logits, so a network that ends in a clamp (ReLU6) can differ by more.

    Parameters
    ----------
    model : Model
        What ran.
    max_logit : float
        Largest absolute logit.

    Returns
    -------
    float
        Allowed absolute difference.
    """
    path = {spec.name: 0 for spec in model.graph.inputs}
    shapes = model.graph.shapes
    for node in model.graph.nodes:
        before = max(path[name] for name in node.inputs)
        path[node.name] = before + _dot_length(model, node, shapes[node.inputs[0]])
    info = np.finfo(np.float32)
    length = path[model.graph.outputs[0]]
    return 4 * float(info.eps) * max_logit * sqrt(length) + float(info.tiny)


def _dot_length(model: Model, node: Node, shape: tuple[int, ...]) -> int:
    if node.op in ("conv2d", "linear"):
        length = prod(model.weights[node.name].shape[1:])
        return round(_winograd_error(model, node) ** 2 * length)
    if node.op == "avg_pool2d":
        return prod(node.attrs["kernel"])
    if node.op == "adaptive_avg_pool2d":
        return prod(-(-size // out) for size, out in zip(shape[1:], node.shape[1:], strict=True))
    return 2 if node.op in ("add", "mul", "affine", "activation") else 0


def _winograd_error(model: Model, node: Node) -> float:
    """Largest error of the ways to compute a product, over that of direct sums."""
    if node.op != "conv2d":
        return 1.0
    height, width = model.weights[node.name].shape[2:]
    if winograd.fits_tiles(node, (height, width)):
        return TILES_ERROR
    errors = [1.0]
    if winograd.fits_columns(node, (height, width)):
        errors.append(LINE_ERROR[winograd.read_kernel(node, (height, width))[0]])
    if winograd.fits_rows(node, (height, width)):
        errors.append(LINE_ERROR[width])
    return max(errors)

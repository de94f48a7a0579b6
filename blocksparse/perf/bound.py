"""How fast a layer could run on this machine: the larger of computing and reading.

Computing takes at least the useful operations over the measured peak. Reading takes at least the
bytes over the bandwidth of where they come from. The bytes are those no kernel can do without: the
stored weights with their indices and biases, every input once, the output once. Of the image under
the windows of a convolution or pool those rows count that some window reads: a 1x1 convolution of
stride 2 needs every second one. Of a row all of it counts, since its cache lines are read whole.

Where they come from: the whole network's weights are streamed once per inference, so each layer's
come from the nearest level that holds *all* of them. The layer before has just written the
activations, so they come from the nearest level that holds this layer's inputs and output. What
comes from a level passes through all nearer ones; the slowest passage counts:

    bound = max(FLOPs / peak, max over levels (bytes from this level or farther) / bandwidth)

It is a bound from below. Writing counts like reading, which is hardly ever slower; bytes that a
kernel reads several times, from the nearest cache as a rule, count once; and the caches of several
cores count as one large one, as if each thread had its own part of everything. One thing can be
faster: Winograd's convolution does fewer operations than the stored weights ask for, which are what
counts here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from blocksparse.format import Node
from blocksparse.format.model import Model
from blocksparse.perf.ceilings import Ceilings
from blocksparse.runtime.kernels import records
from blocksparse.runtime.step import Step

FLOAT_BYTES = 4
COMPUTE = "compute"


@dataclass(frozen=True)
class Bound:
    """The least time something can take.

    Attributes
    ----------
    ms : float
        Milliseconds.
    by : str
        ``"compute"``, or the level of the memory hierarchy that decides, such as ``"L2"``.
    """

    ms: float
    by: str


@dataclass(frozen=True)
class Traffic:
    """Bytes that one layer has to move, for a whole batch.

    Attributes
    ----------
    weights : int
        Stored weights, indices, bias, scale, shift.
    activations : int
        Inputs, as far as they are needed, and output.
    """

    weights: int
    activations: int


def bound(
    flops: float, traffic: Mapping[str, int], ceilings: Ceilings, threads: int, precision: str
) -> Bound:
    """Return the least time that work and traffic take.

    Parameters
    ----------
    flops : float
        Floating-point operations.
    traffic : mapping of str to int
        Bytes by the level they come from; levels that are not named have none.
    ceilings : Ceilings
        Of the machine.
    threads : int
        How many work.
    precision : str
        What is multiplied, such as ``"f32"``.
    """
    least = Bound(flops / ceilings.peak(precision, threads) / 1e6 if flops else 0.0, COMPUTE)
    passing = 0
    for ceiling in reversed(ceilings.reading):
        passing += traffic.get(ceiling.name, 0)
        ms = passing / ceilings.bandwidth(ceiling.name, threads) / 1e6
        if ms > least.ms:
            least = Bound(ms, ceiling.name)
    return least


def layer_bound(
    flops: float, traffic: Traffic, all_weights: int, ceilings: Ceilings, threads: int
) -> Bound:
    """Return the least time of one layer of a network whose weights take `all_weights` bytes."""
    places: dict[str, int] = {}
    for level, count in (
        (ceilings.level_of(all_weights, threads), traffic.weights),
        (ceilings.level_of(traffic.activations, threads), traffic.activations),
    ):
        places[level] = places.get(level, 0) + count
    return bound(flops, places, ceilings, threads, "f32")


def weight_bytes(model: Model, name: str) -> int:
    """Return the bytes that are stored for a node: weights, indices, bias, scale, shift."""
    weight = model.weights.get(name)
    own = 0 if weight is None else weight.nbytes_values + weight.nbytes_indices
    vectors = (f"{name}.{part}" for part in ("bias", "scale", "shift"))
    return own + sum(model.vectors[key].nbytes for key in vectors if key in model.vectors)


def traffic(model: Model, steps: Sequence[Step], batch: int) -> Traffic:
    """Return what the steps of one node have to move.

    Parameters
    ----------
    model : Model
        The network.
    steps : sequence of Step
        All of one node; or the one that takes the input in, or the one that gives the output out.
    batch : int
        Images.
    """
    node, shapes = steps[0].node, model.graph.shapes
    if steps[0].op in (records.LOAD, records.STORE):
        floats = 2 * prod(shapes[steps[0].source])
        return Traffic(0, FLOAT_BYTES * batch * floats)
    if node.op == "concat":  # parts that were written in place need no copy
        floats = sum(2 * prod(shapes[step.source]) for step in steps)
    elif node.op == "slice":  # reads only what it keeps
        floats = 2 * prod(node.shape)
    else:
        whole = sum(prod(shapes[name]) for name in {*node.inputs})
        # a convolution that takes in the pool behind it writes what that leaves
        written = prod(shapes[steps[-1].target])
        floats = whole - _skipped(model, node, shapes[node.inputs[0]]) + written
    return Traffic(weight_bytes(model, node.name), FLOAT_BYTES * batch * floats)


def _skipped(model: Model, node: Node, shape: tuple[int, ...]) -> int:
    """Count the floats of a node's first input, of this shape, in rows that no window reads."""
    if node.op not in ("conv2d", "max_pool2d", "avg_pool2d") or node.inputs[0] in node.inputs[1:]:
        return 0
    kernel = model.weights[node.name].shape[2] if node.op == "conv2d" else node.attrs["kernel"][0]
    stride, padding = node.attrs["stride"][0], node.attrs["padding"][0]
    dilation = node.attrs["dilation"][0] if "dilation" in node.attrs else 1
    channels, height, width = shape
    rows = stride * np.arange(node.shape[1])[:, None] + dilation * np.arange(kernel) - padding
    read = np.unique(rows[(rows >= 0) & (rows < height)])
    return channels * (height - len(read)) * width

"""A model with every weight stored, and the same with random masks on its layers.

Which layers are left dense follows `blocksparse.sparsity.find_layers`, in its words, on the graph
of a file instead of a PyTorch module.
"""

# K output channels (O of a linear layer)   C input channels of one group (I of a linear layer)

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np

from blocksparse.format import DenseWeight, Model, Node, Weight
from blocksparse.perf.random_masks import Floats, Pattern


@dataclass(frozen=True)
class Choice:
    """Which layers are left dense though a pattern fits them.

    Parameters
    ----------
    first_conv_dense : bool
        The first convolution, in order of execution.
    classifier_dense : bool
        The last linear layer or, where there is none, the last convolution.
    dense : sequence of str
        Globs over layer names, e.g. ``layer4.*.conv2``; ``*`` also matches dots.
    """

    first_conv_dense: bool = True
    classifier_dense: bool = True
    dense: Sequence[str] = ()


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer.

    Attributes
    ----------
    name : str
        Of its node.
    shape : tuple of int
        Of its weight, (K, C, R, S) or (O, I).
    reason : str
        Why it stays dense; "" if it is pruned.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


def find_layers(model: Model, pattern: Pattern, choice: Choice) -> list[Layer]:
    """List every convolution and linear layer of `model`, in order of execution.

    Raises
    ------
    ValueError
        If none can be pruned, or a glob matches none; the text lists the layers.
    """
    nodes = [node for node in model.graph.nodes if node.name in model.weights]
    names = [node.name for node in nodes]
    for glob in choice.dense:
        if not any(fnmatchcase(name, glob) for name in names):
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.5)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"dense: {glob!r} matches no layer.{hint} There are {_list(names)}")
    convs = [node.name for node in nodes if node.op == "conv2d"]
    linears = [node.name for node in nodes if node.op == "linear"]
    kept: dict[str, str] = {}
    if choice.classifier_dense:
        kept |= dict.fromkeys((linears or convs)[-1:], "classifier")
    if choice.first_conv_dense:
        kept |= dict.fromkeys(convs[:1], "first convolution")
    for name in names:
        if any(fnmatchcase(name, glob) for glob in choice.dense):
            kept[name] = "in dense"
    layers = []
    for node in nodes:
        shape = model.weights[node.name].shape
        reason = _grouped(node, shape) or kept.get(node.name, "") or pattern.refusal(shape)
        layers.append(Layer(node.name, shape, reason))
    if all(layer.reason for layer in layers):
        listed = _list([f"{layer.name}: {layer.reason}" for layer in layers])
        raise ValueError(f"no layer is left to prune with {pattern}. The layers are: {listed}")
    return layers


def densify(model: Model, seed: int = 0) -> Model:
    """Return `model` with every weight stored dense and none of them zero.

    Where a weight is zero, because it was pruned, stands a random one of the scale of its layer: a
    random mask on top of the old one would drop more than it says.
    """
    weights: dict[str, Weight] = {}
    for index, (name, weight) in enumerate(model.weights.items()):
        values = weight.to_dense()
        zero = values == 0
        count = int(np.count_nonzero(zero))
        if count:
            random = np.random.default_rng([seed, index])
            others = values[~zero]
            scale = (
                np.sqrt(np.mean(others**2)) if others.size else np.float32(values[0].size ** -0.5)
            )
            signs = random.choice(np.array([-1, 1], np.float32), count)
            values[zero] = signs * random.uniform(0.5, 1.5, count).astype(np.float32) * scale
        weights[name] = DenseWeight(values)
    return replace(model, weights=weights)


def mask_model(
    model: Model, layers: Sequence[Layer], pattern: Pattern, sparsity: float, seed: int = 0
) -> Model:
    """Return `model` with random masks on the layers that are pruned.

    Parameters
    ----------
    model : Model
        Every weight dense; see :func:`densify`.
    layers : sequence of Layer
        From :func:`find_layers`.
    pattern : Pattern
        What may be zero together, and how it is stored.
    sparsity : float
        Share of each layer's weights that goes, 0..1. At 0 the layer is in the sparse layout, with
        everything stored.
    seed : int
        With one seed, what goes at some sparsity also goes at any higher one.
    """
    weights = dict(model.weights)
    for index, layer in enumerate(layers):
        if layer.reason:
            continue
        random = np.random.default_rng([seed, index])
        mask = pattern.mask(layer.shape, sparsity, random)
        # What is left grows, so that activations keep their scale. Without, they would shrink layer
        # by layer, in deep networks down to subnormal numbers, with which many CPUs are slow.
        share = np.count_nonzero(mask) / mask.size
        values: Floats = model.weights[layer.name].to_dense() * mask * np.float32(share**-0.5)
        weights[layer.name] = pattern.store(values)
    return replace(model, weights=weights)


def _grouped(node: Node, shape: tuple[int, ...]) -> str:
    groups = node.attrs.get("groups", 1)
    if groups == 1:
        return ""
    kind = "depthwise" if shape[1] == 1 else "grouped"
    return f"{kind} convolution (groups={groups})"


def _list(entries: list[str], most: int = 20) -> str:
    more = f"; and {len(entries) - most} more" if len(entries) > most else ""
    return "; ".join(entries[:most]) + more

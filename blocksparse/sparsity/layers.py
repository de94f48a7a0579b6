"""Layers: the convolution and linear layers of a network, and those that are left dense."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

# torchvision's AuxLogits, aux1, aux2, aux_classifier: classifiers that only help the training.
_AUXILIARY = re.compile(r"(^|\.)aux", re.IGNORECASE)


@dataclass(frozen=True)
class Layers:
    """Which layers may be pruned. Names are globs over module names, e.g. ``layer4.*.conv2``.

    ``*`` and ``?`` also match dots, ``[ab]`` one of these letters; case counts.

    Parameters
    ----------
    include : sequence of str
        Only layers that match one of these.
    dense : sequence of str
        And none that match one of these.
    first_conv_dense : bool
        Leave the first convolution, in order of definition, dense.
    classifier_dense : bool
        Leave the classifier dense: the last linear layer in order of definition or, where there is
        none (SqueezeNet), the last convolution; and auxiliary classifiers (Inception, GoogLeNet).
    """

    include: Sequence[str] = ("*",)
    dense: Sequence[str] = ()
    first_conv_dense: bool = True
    classifier_dense: bool = True


@dataclass(frozen=True)
class FoundLayer:
    """A convolution or linear layer.

    Parameters
    ----------
    name : str
        Its module name within the network; "" if the network is the layer itself.
    kind : str
        Its class, e.g. "Conv2d".
    shape : tuple of int
        Of its weight.
    reason : str
        Why it stays dense; "" if it may be pruned.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str


def find_layers(network: nn.Module, choice: Layers) -> list[FoundLayer]:
    """List every convolution and linear layer of ``network`` in order of definition.

    Raises
    ------
    ValueError
        If there are none, or a glob of ``choice`` matches none; the text lists the layers.
    """
    found = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, _ConvNd | nn.Linear)
    ]
    if not found:
        raise ValueError(
            f"{type(network).__name__} has no convolution and no linear layer, so nothing can be "
            "pruned: check which module the network is (sparsity.root)"
        )
    names = [name for name, _ in found]
    check_globs("include", choice.include, names)
    check_globs("dense", choice.dense, names)
    main = [(name, module) for name, module in found if not _AUXILIARY.search(name)]
    convs = [name for name, module in main if isinstance(module, _ConvNd)]
    linears = [name for name, module in main if isinstance(module, nn.Linear)]
    classifier = (linears or convs)[-1:]
    owners: dict[int, str] = {}
    layers = []
    for name, module in found:
        weight = module.weight
        reason = ""
        if "weight" not in module._parameters:
            reason = "its weight is computed from other parameters"
        elif id(weight) in owners:
            reason = f"shares its weight with {owners[id(weight)]}"
        elif isinstance(module, _ConvTransposeNd):
            reason = "transposed convolution"
        elif isinstance(module, _ConvNd) and module.groups > 1:
            kind = "depthwise" if module.groups == module.in_channels else "grouped"
            reason = f"{kind} convolution (groups={module.groups})"
        elif not matches_any(name, choice.include):
            reason = "not in include"
        elif matches_any(name, choice.dense):
            reason = "in dense"
        elif choice.first_conv_dense and convs[:1] == [name]:
            reason = "first convolution"
        elif choice.classifier_dense and [name] == classifier:
            reason = "classifier"
        elif choice.classifier_dense and _AUXILIARY.search(name):
            reason = "auxiliary classifier"
        owners.setdefault(id(weight), name)
        layers.append(FoundLayer(name, type(module).__name__, tuple(weight.shape), reason))
    return layers


def matches_any(name: str, globs: Iterable[str]) -> bool:
    """Say whether ``name`` matches one of ``globs``."""
    return any(fnmatchcase(name, glob) for glob in globs)


def check_globs(key: str, globs: Iterable[str], names: Sequence[str]) -> None:
    """Refuse globs that match none of ``names``.

    Raises
    ------
    ValueError
        Naming ``key`` and the glob, and listing ``names``, the most similar first.
    """
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.5)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"{key}: {glob!r} matches no layer.{hint} "
                f"The layers to choose from are: {', '.join(names)}"
            )

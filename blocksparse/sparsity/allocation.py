"""Allocation: how the target is shared out among the layers.

Targets are sparsities of the layers that are pruned. A layer whose floors allow less than its share
takes what they allow, and the others make up for it. If all of them together cannot, that is an
error before training starts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from blocksparse.sparsity.layers import FoundLayer, check_globs, matches_any
from blocksparse.sparsity.patterns import Pattern


@dataclass(frozen=True)
class Candidate:
    """A layer that may be pruned.

    Parameters
    ----------
    name : str
        Its module name.
    full : int
        Weights that go if all its units go.
    most : int
        Weights that may go under the floors.
    shape : tuple of int
        Of its weight.
    """

    name: str
    full: int
    most: int
    shape: tuple[int, ...] = ()


class Unreachable(ValueError):
    """The floors leave fewer weights to prune than the target asks for."""


class Allocation(ABC):
    """A rule that shares a target out."""

    def overall(self, target: float) -> float:
        """Return the sparsity of all pruned layers together, where ``target`` is asked for."""
        return target

    def check(  # noqa: B027 - most rules name no layer
        self, layers: Sequence[FoundLayer], pattern: Pattern
    ) -> None:
        """Refuse names that do not go with ``layers``, all of the network, the dense ones too.

        ``pattern`` is what they are pruned with.

        Raises
        ------
        ValueError
            If a glob matches no layer, or asks for zeros only in layers that are left dense.
        """

    @abstractmethod
    def zeros(self, layers: Sequence[Candidate], target: float, limit: float) -> list[int | None]:
        """Return per layer how many weights must go, 0 for a layer that stays dense.

        Parameters
        ----------
        layers : sequence of Candidate
            All that may be pruned.
        target : float
            The sparsity wanted, 0..1.
        limit : float
            The sparsity the pattern gives when every unit goes: 1, or 1 - n/m. A target counts as a
            fraction of it, because ragged N:M groups give less.

        Returns
        -------
        list of int or None
            None where the weights decide, at every update, among all layers that have None.

        Raises
        ------
        Unreachable
            If the floors do not leave enough.
        ValueError
            If the pattern cannot give as much.
        """


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every layer the same sparsity. What is best for latency, and the default."""

    def zeros(self, layers: Sequence[Candidate], target: float, limit: float) -> list[int | None]:
        """Return the weights that must go per layer; see `Allocation.zeros`."""
        share = share_of(target, limit)
        wanted = _check_room(layers, share, limit)
        result = {layer.name: layer.most for layer in layers}
        level, rest = share, list(layers)
        while rest:
            capped = [layer for layer in rest if weights_for(level, layer.full) > layer.most]
            if not capped:
                break
            rest = [layer for layer in rest if layer not in capped]
            taken = sum(layer.most for layer in layers if layer not in rest)
            level = (wanted - taken) / max(sum(layer.full for layer in rest), 1)
        result |= {layer.name: weights_for(level, layer.full) for layer in rest}
        return [result[layer.name] for layer in layers]


@dataclass(frozen=True)
class Global(Allocation):
    """The least important units of the whole network go, wherever they are.

    To compare layers, a unit's score is divided by the score of all nonzero weights of its layer:
    the scale of a layer's weights says nothing about it, as the batch norm that follows undoes it.
    """

    def zeros(self, layers: Sequence[Candidate], target: float, limit: float) -> list[int | None]:
        """Return None for every layer; see `Allocation.zeros`."""
        wanted = _check_room(layers, share_of(target, limit), limit)
        return [None] * len(layers) if wanted else [0] * len(layers)


@dataclass(frozen=True)
class ERK(Allocation):
    """Small layers keep more: density proportional to the sum of a weight's sides over its size.

    The Erdős-Rényi kernel of Evci et al., "Rigging the Lottery" (arXiv 1911.11134), equation 4.1.
    Layers whose density would be above 1 stay dense. At equal size it takes more multiply-adds than
    `Uniform`: early layers are small, and each of their weights is used at many pixels.
    """

    def zeros(self, layers: Sequence[Candidate], target: float, limit: float) -> list[int | None]:
        """Return the weights that must go per layer; see `Allocation.zeros`."""
        wanted = _check_room(layers, share_of(target, limit), limit)
        raw = [sum(layer.shape) / math.prod(layer.shape) for layer in layers]

        def going(scale: float) -> list[int | None]:
            shares = [min(max(1.0 - scale * each, 0.0), 1.0) for each in raw]
            return [
                min(weights_for(share, layer.full), layer.most)
                for share, layer in zip(shares, layers, strict=True)
            ]

        low, high = 0.0, 1.0 / min(raw, default=1.0)  # everything goes, nothing goes
        for _ in range(60):
            middle = (low + high) / 2
            enough = sum(zeros or 0 for zeros in going(middle)) >= wanted
            low, high = (middle, high) if enough else (low, middle)
        return going(low)


@dataclass(frozen=True)
class Targets(Allocation):
    """Sparsities by name; layers that no name matches share the general target uniformly.

    Parameters
    ----------
    targets : sequence of (str, float)
        Pairs of a glob over layer names and a sparsity. Where several match, the last one counts.
        Sparsity 0 leaves a layer dense. What is given here is kept to: if a layer's floors do not
        allow it, that is an error.
    """

    targets: Sequence[tuple[str, float]] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        pairs = []
        for entry in self.targets:
            if isinstance(entry, str) or len(entry) != 2:
                raise ValueError(f"targets: {entry!r} is not a pair of layer glob and sparsity")
            glob, sparsity = str(entry[0]), float(entry[1])
            if not 0.0 <= sparsity <= 1.0:
                raise ValueError(f"targets: {glob!r} asks for sparsity {sparsity}, not in 0..1")
            pairs.append((glob, sparsity))
        object.__setattr__(self, "targets", tuple(pairs))

    def sparsity_of(self, name: str) -> float | None:
        """Return the sparsity of the last pair that matches ``name``, None if none does."""
        found = [sparsity for glob, sparsity in self.targets if matches_any(name, [glob])]
        return found[-1] if found else None

    def check(self, layers: Sequence[FoundLayer], pattern: Pattern) -> None:
        """Refuse globs that match no layer that is pruned; see `Allocation.check`."""
        check_globs("targets", [glob for glob, _ in self.targets], [x.name for x in layers])
        for glob, sparsity in self.targets:
            matched = [layer for layer in layers if matches_any(layer.name, [glob])]
            if sparsity > 0 and all(layer.reason for layer in matched):
                listed = "; ".join(
                    f"{layer.name} ({layer.reason}: {_mend(layer.reason)})" for layer in matched
                )
                raise ValueError(
                    f"targets: {glob!r} asks for sparsity {sparsity:g}, but all that it matches is "
                    f"left dense: {listed}"
                )

    def zeros(self, layers: Sequence[Candidate], target: float, limit: float) -> list[int | None]:
        """Return the weights that must go per layer; see `Allocation.zeros`."""
        own = {layer.name: self.sparsity_of(layer.name) for layer in layers}
        others = [layer for layer in layers if own[layer.name] is None]
        general = Uniform().zeros(others, target, limit)
        result = dict(zip((layer.name for layer in others), general, strict=True))
        for layer in layers:
            sparsity = own[layer.name]
            if sparsity is None:
                continue
            wanted = weights_for(share_of(sparsity, limit), layer.full)
            if wanted > layer.most:
                raise Unreachable(
                    f"at most {layer.most / layer.full * limit:.4f} in {layer.name}, for which "
                    f"targets ask {sparsity:g}"
                )
            result[layer.name] = wanted
        return [result[layer.name] for layer in layers]


def _mend(reason: str) -> str:
    """Return what to change so that a layer left dense for ``reason`` is pruned."""
    if reason == "first convolution":
        return "set sparsity.first_conv_dense=false"
    if reason.endswith("classifier"):
        return "set sparsity.classifier_dense=false"
    if reason == "not in include":
        return "add it to sparsity.include"
    if reason == "in dense":
        return "take it out of sparsity.dense"
    if reason.startswith("the floors"):
        return "take smaller blocks, or set sparsity.keep_channels=false"
    return "it cannot be pruned, take it out of the targets"


def weights_for(share: float, full: int) -> int:
    """Return the smallest whole number of weights that is at least ``share`` of ``full``."""
    return math.ceil(round(share * full, 6))


def share_of(sparsity: float, limit: float) -> float:
    """Return ``sparsity`` as a fraction of ``limit``.

    Raises
    ------
    ValueError
        If it is more than the pattern can give.
    """
    if sparsity > limit + 1e-9:
        raise ValueError(
            f"sparsity {sparsity:g} is more than the pattern can give, which is {limit:g}: lower "
            "sparsity.target, or choose another pattern"
        )
    return min(sparsity / limit, 1.0)


def _check_room(layers: Sequence[Candidate], share: float, limit: float) -> int:
    """Return the weights that ``share`` of all layers asks for, if the floors leave as many."""
    full = sum(layer.full for layer in layers)
    most = sum(layer.most for layer in layers)
    wanted = weights_for(share, full)
    if wanted > most:
        lacking = {layer: weights_for(share, layer.full) - layer.most for layer in layers}
        tight = sorted((x for x in layers if lacking[x] > 0), key=lambda x: -lacking[x])
        named = [f"{layer.name} {layer.most / layer.full * limit:.4f}" for layer in tight[:8]]
        named += [f"and {len(tight) - 8} more"] if len(tight) > 8 else []
        raise Unreachable(
            f"at most {most / full * limit:.4f} in all. Layers that cannot take their share, and "
            f"what they can take: {', '.join(named)}"
        )
    return wanted

"""The milliseconds of every layer at every sparsity, on the runtime that will run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blocksparse.format import Model
from blocksparse.perf.masked_models import Choice
from blocksparse.perf.random_masks import Blocks, Groups
from blocksparse.perf.what_if import what_if
from blocksparse.sparsity import NM, Block, Pattern, Plan, VectorNM
from blocksparse.sparsity.curves import Curve

__all__ = ["LayerTimes", "measure_times"]


@dataclass(frozen=True)
class LayerTimes:
    """A model of the time of one call: a constant, and something for each layer that is pruned.

    Parameters
    ----------
    dense_ms
        Median milliseconds of each layer stored dense.
    sparse_ms
        The same by sparsity, stored sparse.
    constant_ms
        What all other nodes of the dense network take: first convolution, classifier, pools.
    errors
        For each network timed whole, dense first: predicted over measured time, less 1. What is
        between the nodes is not predicted, and on a busy machine whole networks wait for a core
        more often than a node does.
    dense_network_ms
        The dense network, timed whole.
    threads
        Of a call.
    """

    dense_ms: Mapping[str, float]
    sparse_ms: Mapping[str, Curve]
    constant_ms: float
    errors: tuple[float, ...]
    dense_network_ms: float
    threads: int

    def layer(self, name: str, sparsity: float) -> float:
        """Return the milliseconds of one layer.

        Dense, and below the first sparsity timed (N:M has only one), it is stored dense.
        """
        curve = self.sparse_ms[name]
        if sparsity == 0 or sparsity < curve.sparsities[0] - 1e-6:
            return self.dense_ms[name]
        return curve.at(sparsity)

    def network(self, sparsities: Mapping[str, float]) -> float:
        """Return the milliseconds of a call, with every layer at its own sparsity."""
        layers = sum(self.layer(name, sparsity) for name, sparsity in sparsities.items())
        return self.constant_ms + layers

    def to_csv(self) -> str:
        """Return one line per layer and sparsity: layer, sparsity, milliseconds."""
        lines = ["layer,sparsity,milliseconds"]
        for name, curve in self.sparse_ms.items():
            lines.append(f'"{name}",dense,{self.dense_ms[name]:.5f}')
            pairs = zip(curve.sparsities, curve.values, strict=True)
            lines += [f'"{name}",{sparsity:.6f},{ms:.5f}' for sparsity, ms in pairs]
        return "\n".join(lines) + "\n"


def measure_times(
    dense: Model,
    plan: Plan,
    levels: Sequence[float],
    *,
    threads: int,
    rounds: int,
    min_seconds: float,
    on_progress: Callable[[str, float], None] | None = None,
) -> LayerTimes:
    """Time the layers that a plan prunes, with random masks; see `blocksparse.perf.what_if`.

    Parameters
    ----------
    dense
        The network, exported.
    plan
        Which layers, and with which pattern.
    levels
        Sparsities, 0..1. Where the pattern has only one (N:M), that one is timed.
    threads, rounds, min_seconds, on_progress
        As in `blocksparse.perf.what_if.what_if`.

    Raises
    ------
    ValueError
        If a layer is not in the exported network under its own name.
    RuntimeError
        If the compiled engine cannot run here.
    """
    shapes = {layer.name: layer.shape for layer in plan.pruned}
    missing = [
        name
        for name, shape in shapes.items()
        if name not in dense.weights or dense.weights[name].shape != shape
    ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: not in the exported network under this name, so its time is "
            "not known. It is used more than once, or not at all; leave it dense (sparsity.dense)"
        )
    others = [name for name in dense.weights if name not in shapes]
    found = what_if(
        dense,
        [level for level in levels if level < 1],
        _runtime_pattern(plan.pattern),
        choice=Choice(first_conv_dense=False, classifier_dense=False, dense=others),
        threads=threads,
        rounds=rounds,
        min_seconds=min_seconds,
        on_progress=on_progress,
    )
    sparse_ms = {}
    for layer in found.layers:
        # Floors make several levels one sparsity; the median of their times is less noisy.
        times: dict[float, list[float]] = {}
        for time in layer.times:
            times.setdefault(round(time.sparsity, 9), []).append(time.ms)
        rising = sorted(times)
        medians = tuple(float(np.median(times[sparsity])) for sparsity in rising)
        sparse_ms[layer.name] = Curve(tuple(rising), medians)
    dense_ms = {layer.name: layer.dense_ms for layer in found.layers}
    sums = [sum(dense_ms.values())]
    sums += [sum(layer.ms_at(level.sparsity) for layer in found.layers) for level in found.levels]
    whole = [figures.timing.median_ms for figures in (found.dense, *found.levels)]
    slowest = max(found.layers, key=lambda layer: layer.dense_ms)
    constant = slowest.dense_ms / slowest.dense_share - sums[0]
    errors = (constant + np.array(sums)) / np.array(whole) - 1
    return LayerTimes(
        dense_ms, sparse_ms, constant, tuple(errors.tolist()), whole[0], found.threads
    )


def _runtime_pattern(pattern: Pattern) -> Blocks | Groups:
    """Return the twin of a training pattern that makes random masks without PyTorch."""
    if isinstance(pattern, Block):  # Unstructured is one
        return Blocks(pattern.rows, pattern.cols, pattern.shared)
    if isinstance(pattern, NM):
        return Groups(pattern.n, pattern.m)
    if isinstance(pattern, VectorNM):
        return Groups(pattern.n, pattern.m, pattern.vector)
    raise ValueError(f"the runtime has no times for the pattern {pattern}; choose blocks or N:M")

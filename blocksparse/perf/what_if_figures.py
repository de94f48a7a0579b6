"""What :func:`blocksparse.perf.what_if.what_if` found: figures of networks, layers, and both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blocksparse.perf.masked_models import Layer
from blocksparse.perf.timing import Timing


@dataclass(frozen=True)
class NetworkFigures:
    """The whole network at one sparsity.

    Attributes
    ----------
    sparsity : float
        What was asked of every layer that is pruned, 0..1; 0 for the dense network.
    timing : Timing
        Milliseconds per call, on the whole batch.
    speedup : float
        Median time of the dense network over this one's.
    file_bytes : int
        Bytes of the model file.
    prunable_kept : float
        Share of the weights that is left in the layers that are pruned, 0..1.
    parameters_kept : float
        Share of all parameters that is left, 0..1.
    """

    sparsity: float
    timing: Timing
    speedup: float
    file_bytes: int
    prunable_kept: float
    parameters_kept: float

    def pays(self, dense: NetworkFigures) -> bool:
        """Say whether it is faster than `dense` by more than the quartiles spread."""
        return self.timing.q3_ms < dense.timing.q1_ms


@dataclass(frozen=True)
class LayerTime:
    """One layer at one sparsity.

    Attributes
    ----------
    asked : float
        The sparsity asked for, 0..1.
    sparsity : float
        The one it has, 0..1: up to one block more, or less where a floor keeps blocks.
    ms, q1_ms, q3_ms : float
        Milliseconds per call: the median, and the first and third quartile.
    """

    asked: float
    sparsity: float
    ms: float
    q1_ms: float
    q3_ms: float


@dataclass(frozen=True)
class LayerFigures:
    """One layer that is pruned, dense and at every sparsity.

    Attributes
    ----------
    name : str
        Of its node.
    shape : tuple of int
        Of its weight, (K, C, R, S) or (O, I).
    dense_ms, dense_q1_ms, dense_q3_ms : float
        Milliseconds per call, stored dense: the median, and the first and third quartile.
    dense_share : float
        Its share of the time of the dense network, 0..1.
    times : tuple of LayerTime
        By rising sparsity.
    break_even : float or None
        The sparsity from which on it is faster than dense by more than the quartiles spread, 0..1:
        0 if it always is, None if it is not even at the highest.
    """

    name: str
    shape: tuple[int, ...]
    dense_ms: float
    dense_q1_ms: float
    dense_q3_ms: float
    dense_share: float
    times: tuple[LayerTime, ...]
    break_even: float | None

    def at(self, asked: float) -> LayerTime:
        """Return the time at a sparsity that was asked for."""
        return next(time for time in self.times if time.asked == asked)

    def ms_at(self, asked: float) -> float:
        """Return the median milliseconds at a sparsity that was asked for."""
        return self.at(asked).ms

    def slower(self, asked: float) -> bool:
        """Say whether it is slower than dense by more than the quartiles spread."""
        return self.at(asked).q1_ms > self.dense_q3_ms

    def faster(self, asked: float) -> bool:
        """Say whether it is faster than dense by more than the quartiles spread."""
        return self.at(asked).q3_ms < self.dense_q1_ms


@dataclass(frozen=True)
class WhatIf:
    """What sparsity would bring.

    Attributes
    ----------
    pattern : str
        In words.
    batch, threads : int
        Images per call, and threads of a call.
    dense : NetworkFigures
        The network with every weight stored.
    levels : tuple of NetworkFigures
        At the sparsities asked for, rising.
    layers : tuple of LayerFigures
        The layers that are pruned, in order of execution.
    left_dense : tuple of Layer
        The others, with the reason.
    """

    pattern: str
    batch: int
    threads: int
    dense: NetworkFigures
    levels: tuple[NetworkFigures, ...]
    layers: tuple[LayerFigures, ...]
    left_dense: tuple[Layer, ...]

    def slower_than_dense(self, asked: float) -> list[LayerFigures]:
        """List the layers that lose time, beyond the spread, at a sparsity that was asked for."""
        return [layer for layer in self.layers if layer.slower(asked)]

    def within_spread(self, asked: float) -> list[LayerFigures]:
        """List the layers of which the rounds do not tell whether they gain or lose time."""
        return [x for x in self.layers if not x.slower(asked) and not x.faster(asked)]


def break_even(points: Sequence[tuple[float, float]], dense_ms: float) -> float | None:
    """Return the sparsity from which on a layer is faster than dense.

    Parameters
    ----------
    points : sequence of (float, float)
        Sparsity, 0..1, and milliseconds, by rising sparsity. Between two, time is taken to change
        linearly.
    dense_ms : float
        Milliseconds stored dense.

    Returns
    -------
    float or None
        0 if it is faster at every point, None if it is not at the last one.

    Examples
    --------
    >>> break_even([(0.0, 1.2), (0.5, 0.8), (0.9, 0.3)], 1.0)
    0.25
    """
    slow = [index for index, (_, ms) in enumerate(points) if ms >= dense_ms]
    if not slow:
        return 0.0
    if slow[-1] == len(points) - 1:
        return None
    (low, before), (high, after) = points[slow[-1]], points[slow[-1] + 1]
    return low + (high - low) * (before - dense_ms) / (before - after)

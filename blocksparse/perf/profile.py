"""Where the time of a network goes, layer by layer, and how near each layer is to its bound.

The compiled engine notes the time at the end of every step, on every thread. Steps are summed by
the node of the graph they belong to (a strided convolution first copies its input into phase
planes, which makes two steps) and set against what the layer needs at least, which
`blocksparse.perf.bound` says.
"""

# T threads, S steps, all of one batch size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from blocksparse.format.model import Model
from blocksparse.perf.bound import Bound, layer_bound, traffic, weight_bytes
from blocksparse.perf.ceilings import Ceilings
from blocksparse.perf.cost import NodeCost, cost
from blocksparse.perf.timing import Timing, interleave
from blocksparse.runtime.compiled import CompiledEngine
from blocksparse.runtime.explain import LayerChoice
from blocksparse.runtime.kernels import records
from blocksparse.runtime.network import Network
from blocksparse.runtime.step import Step
from blocksparse.runtime.trace import Trace

WINOGRAD = "winograd"
"""The part of a convolution that is computed in Winograd's way, transforms included."""

_PARTS = {
    records.LOAD: "load", records.STORE: "store", records.COPY: "copy", records.CONV: "product",
    records.CONV_NM: "product", records.LINEAR: "product", records.LINEAR_NM: "product",
    records.POOL: "pool", records.ADAPTIVE_POOL: "pool", records.ELEMENTWISE: "elementwise",
    records.WINOGRAD: WINOGRAD, records.LINES_CONV: WINOGRAD, records.TILES_CONV: WINOGRAD,
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """What one node of the graph took; or taking the input in, or giving the output out.

    Attributes
    ----------
    name, op : str
        The node; ``load`` and ``store`` are the copies of the input and of the output.
    weight_shape : tuple of int or None
        Shape of the weight, None without.
    output_shape : tuple of int
        For one image.
    density : float or None
        Nonzero fraction of the weight, 0..1; None without.
    kernel : str
        What computes it.
    tile : str
        Outputs by inputs of one block of the kernel, such as ``8x8``; empty without a weight.
    ms : float
        Milliseconds, waiting for the slowest thread included: the mean over the middle half of
        the calls, those neither quick nor slow as a whole.
    share : float
        Of the sum of all layers, 0..1.
    gflops_useful, gflops_dense_equivalent : float
        10^9 operations per second, of the stored weights and of the layer with none missing.
    bound_ms : float
        Milliseconds it takes at least on this machine.
    bound_by : str
        ``compute``, or the level of the memory hierarchy that decides.
    bound_share : float
        ``bound_ms / ms``; 1 is as fast as the machine allows without Winograd's trick.
    imbalance : float or None
        Work of the busiest thread over that of the average thread, minus 1; None for one thread.
    parts : tuple of (str, float)
        Milliseconds of the kinds of steps it consists of; they add up to ``ms``.
    """

    name: str
    op: str
    weight_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...]
    density: float | None
    kernel: str
    tile: str
    ms: float
    share: float
    gflops_useful: float
    gflops_dense_equivalent: float
    bound_ms: float
    bound_by: str
    bound_share: float
    imbalance: float | None
    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Profile:
    """A network's layers in the order they run; nodes that nothing has to be done for left out.

    Attributes
    ----------
    layers : tuple of Layer
        The layers.
    batch, threads : int
        Images per call, and threads.
    layers_ms : float
        Sum over the layers.
    network : Timing
        Whole calls, without noting any times.
    """

    layers: tuple[Layer, ...]
    batch: int
    threads: int
    layers_ms: float
    network: Timing

    @property
    def rest_ms(self) -> float:
        """What a call takes besides its layers: Python, waking threads.

        Less than zero where noting the times costs more than that.
        """
        return self.network.median_ms - self.layers_ms

    @property
    def bound_ms(self) -> float:
        """Sum of the bounds of the layers."""
        return sum(layer.bound_ms for layer in self.layers)


def profile(
    network: Network,
    ceilings: Ceilings,
    batch: int = 1,
    rounds: int = 20,
    on_round: Callable[[float], None] | None = None,
) -> Profile:
    """Time the layers of a network on random images.

    Whole calls and calls that note the time of each step take turns.

    Parameters
    ----------
    network : Network
        Loaded, with its number of threads.
    ceilings : Ceilings
        Of this machine.
    batch : int
        Images per call.
    rounds : int
        Timed whole calls; twice as many note their steps.
    on_round : callable, optional
        Told the share of the work that is done, 0..1.

    Raises
    ------
    ValueError
        If the network does not run on the compiled engine, the only one that has steps.
    RuntimeError
        Where compiled code cannot tell the time.
    """
    engine, threads = network.engine, network.threads
    if not isinstance(engine, CompiledEngine):
        raise ValueError(
            f"only the compiled engine can be profiled, and this network runs on the {engine}"
        )
    images = np.random.default_rng(0).standard_normal((batch, *network.input_shape), np.float32)
    network(images)
    traces: list[Trace] = []
    timings = interleave(
        {
            "network": lambda: network(images),
            "steps": lambda: traces.append(engine.timed_run(images, threads)[1]),
        },
        rounds=rounds,
        on_round=on_round,
    )
    layers = layers_of(network.model, engine.choices(), traces, ceilings, batch)
    total = sum(layer.ms for layer in layers)
    return Profile(tuple(layers), batch, threads, total, timings["network"])


def layers_of(
    model: Model,
    choices: Sequence[LayerChoice],
    traces: Sequence[Trace],
    ceilings: Ceilings,
    batch: int,
) -> list[Layer]:
    """Turn traces of calls into one row per layer.

    Parameters
    ----------
    model : Model
        The network.
    choices : sequence of LayerChoice
        What runs each node.
    traces : sequence of Trace
        At least one; all of the same steps and number of threads.
    ceilings : Ceilings
        Of the machine.
    batch : int
        Images per call.
    """
    steps = traces[0].steps
    step_ms = np.stack([trace.step_ns for trace in traces]) / 1e6  # [runs, S]
    busy_ms = np.stack([trace.busy_ns for trace in traces]) / 1e6  # [runs, T, S]
    # Medians of steps do not add up to the median of calls (each is below its mean), means do.
    kept = _middle_half(step_ms.sum(axis=1))
    step_ms, busy_ms = step_ms[kept].mean(axis=0), busy_ms[kept]
    threads = busy_ms.shape[1]
    groups: dict[tuple[str, str], list[int]] = {}
    for i, step in enumerate(steps):
        own = _PARTS[step.op] if step.op in (records.LOAD, records.STORE) else step.node.op
        name = step.source if own in ("load", "store") else step.node.name
        groups.setdefault((name, own), []).append(i)
    kernels = {choice.name: choice.kernel for choice in choices}
    costs = {row.name: row for row in cost(model)}
    all_weights = sum(weight_bytes(model, node.name) for node in model.graph.nodes)
    took = {key: float(step_ms[at].sum()) for key, at in groups.items()}
    total = sum(took.values())
    layers = []
    for key, at in groups.items():
        name, op = key
        own_steps = [steps[i] for i in at]
        copies = op in ("load", "store")
        work = None if copies else costs[name]
        flops = batch * work.flops_kept if work else 0
        need = traffic(model, own_steps, batch)
        layers.append(
            _layer(
                model, name, op, own_steps, took[key], total, work, batch,
                "f32_copy" if copies else kernels[name],
                layer_bound(flops, need, all_weights, ceilings, threads),
                _imbalance(busy_ms[:, :, at]),
                _parts([steps[i].op for i in at], step_ms[at]),
            )
        )  # fmt: skip
    return layers


def _layer(
    model: Model, name: str, op: str, steps: list[Step], ms: float, total: float,
    work: NodeCost | None, batch: int, kernel: str, least: Bound, imbalance: float | None,
    parts: tuple[tuple[str, float], ...],
) -> Layer:  # fmt: skip
    weight = model.weights.get(name) if work else None
    packed = next((step.packed for step in steps if step.packed is not None), None)
    return Layer(
        name=name,
        op=op,
        weight_shape=None if weight is None else weight.shape,
        output_shape=model.graph.shapes[name],
        density=None if weight is None else weight.density,
        kernel=kernel,
        tile="" if packed is None else f"{packed.rows}x{packed.columns}",
        ms=ms,
        share=_ratio(ms, total),
        gflops_useful=_ratio(batch * work.flops_kept / 1e6, ms) if work else 0.0,
        gflops_dense_equivalent=_ratio(batch * work.flops_dense / 1e6, ms) if work else 0.0,
        bound_ms=least.ms,
        bound_by=least.by,
        bound_share=_ratio(least.ms, ms),
        imbalance=imbalance,
        parts=parts,
    )


def _middle_half(times: np.ndarray) -> np.ndarray:
    """Return the places of the middle half of the calls, from slow and quick ones away."""
    order = np.argsort(times, kind="stable")
    return order[len(order) // 4 : len(order) - len(order) // 4]


def _imbalance(busy_ms: np.ndarray) -> float | None:
    """Busiest over average thread, minus 1; from ``busy_ms[run, thread, step]``.

    Threads wait for each other after every step, so each step has a busiest thread of its own.
    """
    if busy_ms.shape[1] == 1:
        return None
    return _ratio(float(busy_ms.max(axis=1).sum()), float(busy_ms.mean(axis=1).sum()), 1.0) - 1


def _parts(ops: list[int], step_ms: np.ndarray) -> tuple[tuple[str, float], ...]:
    """Milliseconds of each kind of step, in the order of the first of each."""
    parts: dict[str, float] = {}
    for op, ms in zip(ops, step_ms, strict=True):
        name = _PARTS.get(op, "other")
        parts[name] = parts.get(name, 0.0) + float(ms)
    return tuple(parts.items())


def _ratio(value: float, by: float, without: float = 0.0) -> float:
    return value / by if by else without

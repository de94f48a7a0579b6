"""A network over a series of batches or sizes: what is called, its points, its layers' shares."""

# N images, C H W image

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import numpy.typing as npt

import blocksparse
from blocksparse.format import Graph, Model, ValueSpec
from blocksparse.format.ops import OPS
from blocksparse.perf import Timing, cost, interleave, total
from blocksparse.runtime.algorithms import Algorithm
from blocksparse.runtime.compiled import CompiledEngine
from blocksparse.runtime.kernels import records
from blocksparse.runtime.trace import Trace

REACH = 2  # neighbours on either side
CLIFF = 1.1  # times the neighbours' median from which layers are named
NAMED = 3  # layers

WAYS = {
    records.CONV: Algorithm.DIRECT,
    records.WINOGRAD: Algorithm.COLUMNS,
    records.LINES_CONV: Algorithm.ROWS,
    records.TILES_CONV: Algorithm.TILES,
}


@dataclass(frozen=True)
class Point:
    """One batch or one size.

    Attributes
    ----------
    at : int
        Images of the batch, or height and width of the image in pixels.
    timing : Timing
        Milliseconds per call.
    each : float
        Nanoseconds per pixel of all images.
    ratio : float
        Of `each` to the median of the neighbours'.
    work : float
        The same of the multiply-adds per pixel: what of the ratio lies in the network, whose layers
        round sizes up.
    layers : tuple of str
        Where the ratio is `CLIFF` or more: the layers that most of the time beyond the neighbours'
        goes to.
    """

    at: int
    timing: Timing
    each: float
    ratio: float
    work: float
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """How well threads shared the work of one layer.

    Attributes
    ----------
    name, way : str
        The layer, and how it is computed; "" where there is one way only.
    one_ms, several_ms : float
        Milliseconds of a call that it takes on one thread, and on several.
    idle : float
        ``1 - mean / max`` of the time each thread worked on it, 0..1: what threads wait for the
        slowest.
    """

    name: str
    way: str
    one_ms: float
    several_ms: float
    idle: float


def resized(model: Model, size: int) -> Model:
    """Return a model that takes images of another size, with the same weights.

    Parameters
    ----------
    model : Model
        Whose classifier does not care for the size, such as one with a global pooling before it.
    size : int
        Height and width of the new images, in pixels.

    Raises
    ------
    ValueError
        If a layer cannot take what it would be given; names the layer.
    """
    (source,) = model.graph.inputs
    source = ValueSpec(source.name, (source.shape[0], size, size))
    shapes = {source.name: source.shape}
    nodes = []
    for node in model.graph.nodes:
        weight = model.weights[node.name].shape if node.name in model.weights else None
        given = [shapes[name] for name in node.inputs]
        try:
            shape = OPS[node.op].infer_shape(node.attrs, given, weight)
        except ValueError as error:
            raise ValueError(f"images of {size}x{size} do not fit {node.name}: {error}") from None
        shapes[node.name] = shape
        nodes.append(replace(node, shape=shape))
    # Which part of a picture becomes the input was said for the old size.
    return replace(
        model, graph=Graph((source,), model.graph.outputs, tuple(nodes)), preprocessing=None
    )


def beside(values: Sequence[float]) -> list[float]:
    """Return the median of each value's neighbours: `REACH` on either side, fewer at the ends."""
    return [
        median([*values[max(0, i - REACH) : i], *values[i + 1 : i + 1 + REACH]])
        for i in range(len(values))
    ]


class Call:
    """A network with the images it is called with.

    Parameters
    ----------
    model : Model
        What runs, through the compiled kernels.
    batch : int
        Images of a call; random.
    threads : int
        To run with.
    """

    def __init__(self, model: Model, batch: int, threads: int) -> None:
        random = np.random.default_rng(0)
        self.images = random.standard_normal((batch, *model.input_shape), np.float32)
        self.threads = threads
        self.network = blocksparse.load(model, threads=threads, engine="compiled")
        self()  # what is measured or made once

    @property
    def pixels(self) -> int:
        """Pixels of all images."""
        return len(self.images) * self.images.shape[2] * self.images.shape[3]

    def __call__(self) -> npt.NDArray[np.float32]:
        """Run once."""
        return self.network(self.images)

    def trace(self) -> Trace:
        """Run once, and say where the time went."""
        engine = self.network.engine
        assert isinstance(engine, CompiledEngine)
        return engine.timed_run(self.images, self.threads)[1]


def ways(trace: Trace) -> dict[str, str]:
    """Say how each convolution of a trace was computed, by its name."""
    return {s.node.name: str(WAYS[s.op]) for s in trace.steps if s.op in WAYS}


def points(
    at: Sequence[int],
    calls: Sequence[Call],
    rounds: int,
    seconds: float,
    on_round: Callable[[float], None] | None = None,
) -> tuple[Point, ...]:
    """Time calls in turns and compare each with its neighbours.

    Parameters
    ----------
    at : sequence of int
        What the points are called, in order.
    calls : sequence of Call
        One for each.
    rounds, seconds, on_round
        As for `interleave`.
    """
    timings = interleave(
        {str(i): call for i, call in enumerate(calls)},
        rounds=rounds,
        min_seconds=seconds,
        on_round=on_round,
    )
    each = [
        1e6 * timing.median_ms / call.pixels
        for call, timing in zip(calls, timings.values(), strict=True)
    ]
    work = [
        total(cost(call.network.model)).flops_kept * len(call.images) / call.pixels
        for call in calls
    ]
    ratios = [own / other for own, other in zip(each, beside(each), strict=True)]
    expected = [own / other for own, other in zip(work, beside(work), strict=True)]
    reasons = _reasons(calls, rounds) if max(ratios) >= CLIFF else [()] * len(calls)
    return tuple(
        Point(name, timing, own, ratio, wanted, why if ratio >= CLIFF else ())
        for name, timing, own, ratio, wanted, why in zip(
            at, timings.values(), each, ratios, expected, reasons, strict=True
        )
    )


def _reasons(calls: Sequence[Call], rounds: int) -> list[tuple[str, ...]]:
    """Name the layers of each call that take longest beyond the neighbours', per pixel."""
    traces = _traces(calls, rounds)
    times = [[trace.by_node() for trace in each] for each in traces]
    # which nodes have steps of their own depends on how the network is computed at a size
    layers = {name: [0.0] * len(calls) for (first, *_) in times for name in first}
    for i, (call, runs) in enumerate(zip(calls, times, strict=True)):
        for name, values in layers.items():
            values[i] = median(run.get(name, 0.0) for run in runs) / call.pixels
    normal = {name: beside(values) for name, values in layers.items()}
    result = []
    for i, (trace, *_) in enumerate(traces):
        beyond = {name: values[i] - normal[name][i] for name, values in layers.items()}
        whole, way = sum(values[i] for values in layers.values()), ways(trace)
        most = sorted(beyond, key=lambda name: -beyond[name])[:NAMED]
        titles = {name: f"{name} ({way[name]})" if name in way else name for name in most}
        result.append(tuple(f"{titles[n]} {100 * beyond[n] / whole:+.1f} %" for n in most))
    return result


def _traces(calls: Sequence[Call], rounds: int) -> list[list[Trace]]:
    """Trace calls in turns, as `interleave` times them, so that traces explain its figures."""
    traces: list[list[Trace]] = [[] for _ in calls]
    turns = list(zip(calls, traces, strict=True))
    for _ in range(rounds):
        for call, own in turns:
            call()  # its data are in the caches, and its threads are awake
            own.append(call.trace())
        turns.reverse()
    return traces


def shares(one: Call, several: Call, rounds: int) -> tuple[Share, ...]:
    """Return how well the work of each layer was shared, medians over some runs.

    Parameters
    ----------
    one, several : Call
        The same images on one thread, and on several.
    rounds : int
        Runs of each, in turns.
    """
    alone, together = _traces([one, several], rounds)
    steps, way = together[0].steps, ways(together[0])
    single = [trace.by_node() for trace in alone]
    rows = []
    for name in single[0]:
        mine = [i for i, step in enumerate(steps) if step.owner == name]
        idle = []
        for trace in together:
            busy = trace.busy_ns[:, mine]  # threads meet after every step: the slowest of each
            idle.append(1 - float(busy.mean(0).sum()) / max(float(busy.max(0).sum()), 1.0))
        rows.append(
            Share(
                name,
                way.get(name, ""),
                median(run[name] for run in single),
                median(float(trace.step_ns[mine].sum()) / 1e6 for trace in together),
                median(idle),
            )
        )
    return tuple(rows)

"""What sparsity would bring on this machine, measured before any training.

Copies of a network with random masks run in turn with its dense version. How fast a kernel is
depends on how many blocks are stored, hardly on which and not on their values, so the times are
about those of a trained network of the same sparsity. Accuracy is another matter: only training
tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing

import numpy as np
import numpy.typing as npt

from blocksparse.format import Model
from blocksparse.format.writer import file_size
from blocksparse.perf.cost import cost, stored_weights, total
from blocksparse.perf.masked_models import Choice, Layer, densify, find_layers, mask_model
from blocksparse.perf.random_masks import Pattern
from blocksparse.perf.timing import Timing, interleave
from blocksparse.perf.what_if_figures import (
    LayerFigures,
    LayerTime,
    NetworkFigures,
    WhatIf,
    break_even,
)
from blocksparse.runtime import load
from blocksparse.runtime.compiled import CompiledEngine
from blocksparse.runtime.network import Network

LADDER = (0.0, 0.25, 0.5, 0.75, 0.9)
"""Sparsities at which layers are timed, besides those asked for, to find where they break even."""

_DENSE = "dense"
Progress = Callable[[str, float], None]


def what_if(
    model: Model,
    sparsities: Sequence[float],
    pattern: Pattern,
    *,
    choice: Choice | None = None,
    batch: int = 1,
    threads: int | None = None,
    rounds: int = 20,
    min_seconds: float = 0.0,
    on_progress: Progress | None = None,
) -> WhatIf:
    """Measure a network dense and with random masks.

    Parameters
    ----------
    model : Model
        Dense or sparse; its own zeros are filled first.
    sparsities : sequence of float
        In 0..1, 1 excluded. Not looked at where the pattern has only one.
    pattern : Pattern
        What may be zero together.
    choice : Choice, optional
        Which layers are left dense. By default the first convolution and the classifier.
    batch : int
        Images per call.
    threads : int, optional
        Threads of a call; by default as many as `blocksparse.load` takes.
    rounds, min_seconds : int, float
        As in :func:`blocksparse.perf.interleave`: once for the network, once for its layers.
    on_progress : callable, optional
        Told what is being done, and the share of all that is done, 0..1.

    Returns
    -------
    WhatIf

    Raises
    ------
    ValueError
        If a sparsity cannot be had, or no layer can be pruned.
    RuntimeError
        If the compiled engine cannot run here, or cannot time its steps.
    """
    asked, ladder = _levels(sparsities, pattern)
    tell = on_progress or (lambda what, share: None)
    layers = find_layers(model, pattern, choice or Choice())
    dense = densify(model)
    models = {_DENSE: dense}
    networks: dict[str, Network] = {}
    images = np.random.default_rng(0).standard_normal((batch, *model.input_shape), dtype=np.float32)
    with ExitStack() as stack:
        for done, level in enumerate([None, *ladder]):
            tell("making networks", 0.3 * done / (len(ladder) + 1))
            name = _DENSE if level is None else str(level)
            if level is not None:
                models[name] = mask_model(dense, layers, pattern, level)
            networks[name] = load(models[name], threads=threads, engine="compiled")
            stack.enter_context(closing(networks[name]))
            networks[name].warmup(batch)
        shown = {name: networks[name] for name in (_DENSE, *map(str, asked))}
        timings = interleave(
            {name: lambda network=network: network(images) for name, network in shown.items()},  # type: ignore[misc]
            rounds=rounds,
            min_seconds=min_seconds,
            on_round=lambda share: tell("timing networks", 0.3 + 0.35 * share),
        )
        times = _node_times(
            networks,
            images,
            rounds,
            min_seconds,
            lambda share: tell("timing layers", 0.65 + 0.35 * share),
        )
    pruned = [layer for layer in layers if not layer.reason]
    return WhatIf(
        pattern=str(pattern),
        batch=batch,
        threads=networks[_DENSE].threads,
        dense=_network_figures(0.0, dense, dense, pruned, timings[_DENSE], timings[_DENSE]),
        levels=tuple(
            _network_figures(
                level, models[str(level)], dense, pruned, timings[str(level)], timings[_DENSE]
            )
            for level in asked
        ),
        layers=tuple(
            _layer_figures(layer, {level: models[str(level)] for level in ladder}, times)
            for layer in pruned
        ),
        left_dense=tuple(layer for layer in layers if layer.reason),
    )


def _levels(
    sparsities: Sequence[float], pattern: Pattern
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the sparsities to show, and those to time layers at; both rising."""
    if pattern.fixed_sparsity is not None:
        return (pattern.fixed_sparsity,), (pattern.fixed_sparsity,)
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"sparsity {sparsity:g} is not a share of at least 0 and below 1, such as 0.75"
            )
    if not sparsities:
        raise ValueError("no sparsity is given; 0.5, 0.75 and 0.9 are a good start")
    return tuple(sorted(set(sparsities))), tuple(sorted({*LADDER, *sparsities}))


def _network_figures(
    sparsity: float,
    model: Model,
    dense: Model,
    pruned: Sequence[Layer],
    timing: Timing,
    dense_timing: Timing,
) -> NetworkFigures:
    kept, full = (
        sum(stored_weights(each.weights[layer.name]) for layer in pruned) for each in (model, dense)
    )
    return NetworkFigures(
        sparsity=sparsity,
        timing=timing,
        speedup=dense_timing.median_ms / timing.median_ms,
        file_bytes=file_size(model),
        prunable_kept=kept / full,
        parameters_kept=total(cost(model)).parameter_density,
    )


def _layer_figures(
    layer: Layer, models: Mapping[float, Model], times: Mapping[str, Mapping[str, Timing]]
) -> LayerFigures:
    name = layer.name
    points = []
    for level, model in models.items():
        timing = times[str(level)][name]
        sparsity = 1 - model.weights[name].density
        points.append(LayerTime(level, sparsity, timing.median_ms, timing.q1_ms, timing.q3_ms))
    dense = times[_DENSE][name]
    return LayerFigures(
        name=name,
        shape=layer.shape,
        dense_ms=dense.median_ms,
        dense_q1_ms=dense.q1_ms,
        dense_q3_ms=dense.q3_ms,
        dense_share=dense.median_ms / sum(timing.median_ms for timing in times[_DENSE].values()),
        times=tuple(points),
        # from the near ends of the spreads: medians alone would call noise a gain
        break_even=break_even([(point.sparsity, point.q3_ms) for point in points], dense.q1_ms),
    )


def _node_times(
    networks: dict[str, Network],
    images: npt.NDArray[np.float32],
    rounds: int,
    min_seconds: float,
    on_round: Callable[[float], None],
) -> dict[str, dict[str, Timing]]:
    """Return the time of every node, by network and node name."""
    calls: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in networks}

    def timed(name: str) -> None:
        engine = networks[name].engine
        assert isinstance(engine, CompiledEngine)  # as asked of load
        _, trace = engine.timed_run(images, networks[name].threads)
        calls[name].append(trace.step_ns)

    interleave(
        {name: lambda name=name: timed(name) for name in networks},  # type: ignore[misc]
        rounds=rounds,
        min_seconds=min_seconds,
        on_round=on_round,
    )
    result: dict[str, dict[str, Timing]] = {}
    for name, network in networks.items():
        assert isinstance(network.engine, CompiledEngine)
        owners = [step.owner for step in network.engine.steps.steps]
        # The first call of each turn only warms the caches.
        nodes, index = np.unique(owners, return_inverse=True)
        per_node = np.zeros((len(calls[name]) // 2, len(nodes)))
        for row, step_ns in zip(per_node, calls[name][1::2], strict=True):
            np.add.at(row, index, step_ns)
        seconds = (per_node.T / 1e9).tolist()
        result[name] = {
            node: Timing.of(each) for node, each in zip(nodes.tolist(), seconds, strict=True)
        }
    return result

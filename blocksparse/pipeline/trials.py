"""Whole networks pruned by an allocation, without training: really evaluated, really timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
from torch import nn

from blocksparse.export import export_model
from blocksparse.format import Model
from blocksparse.perf import Timing, interleave
from blocksparse.pipeline.choices import with_zeros
from blocksparse.pipeline.evaluation import CalibrationLoss
from blocksparse.runtime import load
from blocksparse.sparsity import MaskedWeights, Plan

__all__ = ["Trial", "timed_together", "try_out"]


@dataclass(frozen=True)
class Trial:
    """A network with all layers pruned at once, and no training after it.

    Parameters
    ----------
    loss, accuracy
        On the training images that decisions rest on: nats, and 0..1.
    model
        Exported, as it would run.
    """

    loss: float
    accuracy: float
    model: Model


def try_out(
    network: nn.Module,
    plan: Plan,
    sparsities: Mapping[str, float],
    evaluate: CalibrationLoss,
    input_shape: tuple[int, int, int],
) -> Trial:
    """Prune a copy of ``network``, re-estimate its batch norms, evaluate and export it."""
    pruned = copy.deepcopy(network)
    masked = MaskedWeights(with_zeros(plan, sparsities))
    masked.adopt(masked.build(pruned, 1.0))
    masked.impose(pruned)
    loss, accuracy = evaluate(pruned)
    sparse = {layer.param: plan.pattern for layer in plan.pruned if sparsities[layer.name] > 0}
    return Trial(loss, accuracy, export_model(pruned, input_shape, patterns=sparse))


def timed_together(
    models: Mapping[str, Model],
    *,
    threads: int,
    rounds: int,
    min_seconds: float,
    on_round: Callable[[float], None] | None = None,
) -> dict[str, Timing]:
    """Time one image through each model, all in turn; see `blocksparse.perf.interleave`."""
    shape = next(iter(models.values())).input_shape
    image = np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)
    with ExitStack() as stack:
        networks = {}
        for name, model in models.items():
            networks[name] = stack.enter_context(closing(load(model, threads=threads)))
            networks[name].warmup()
        return interleave(
            {name: lambda network=network: network(image) for name, network in networks.items()},  # type: ignore[misc]
            rounds=rounds,
            min_seconds=min_seconds,
            on_round=on_round,
        )

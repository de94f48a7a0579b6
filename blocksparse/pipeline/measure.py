"""What the closing report is made of: accuracy, bytes, work and time, measured and not assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import nn

from blocksparse.export import ExportReport
from blocksparse.format import Model
from blocksparse.perf import cost, interleave, total
from blocksparse.report import (
    DENSE_RUNTIME,
    SPARSE_RUNTIME,
    Accuracy,
    Cost,
    Latency,
    Sizes,
    Sparsity,
)
from blocksparse.runtime import load
from blocksparse.sparsity import Plan

__all__ = ["DENSE_PYTORCH", "accuracies", "accuracy", "latencies", "sizes", "sparsity_of", "work"]

DENSE_PYTORCH = "dense, PyTorch eager"

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


@torch.inference_mode()
def accuracy(network: nn.Module, batches: Batches) -> float:
    """Return the share of images, 0..1, that `network` classifies correctly.

    It runs on a GPU if there is one, and is left on the CPU in evaluation mode.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).eval()
    hits = seen = 0
    for images, labels in batches:
        hits += int((network(images.to(device)).argmax(1).cpu() == labels).sum())
        seen += len(labels)
    network.cpu()
    return hits / seen


def sparsity_of(plan: Plan, network: nn.Module) -> Sparsity:
    """Return what was pruned, counted in the weights."""
    weights = plan.weights(network).values()
    zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights)
    return Sparsity(
        pattern=str(plan.pattern),
        target=plan.target,
        reached=zeros / max(plan.prunable, 1),
        layers=len(plan.pruned),
    )


def accuracies(dense: float, export: ExportReport) -> Accuracy:
    """Return the three accuracies; the export counted two of them on the validation set."""
    proof = export.verification
    if proof.accuracy_torch is None or proof.accuracy_runtime is None:
        raise ValueError("the export was verified without a validation set, so it has no accuracy")
    return Accuracy(
        dense=dense,
        sparse=proof.accuracy_torch,
        runtime=proof.accuracy_runtime,
        images=proof.val_images,
    )


def sizes(dense_checkpoint: Path, export: ExportReport) -> Sizes:
    """Return bytes of the dense checkpoint and of the exported file, as they lie on disk."""
    return Sizes(
        dense_checkpoint=dense_checkpoint.stat().st_size,
        exported_file=export.file_bytes,
        values=export.values_bytes,
        indices=export.indices_bytes,
    )


def work(model: Model) -> Cost:
    """Return parameters and FLOPs of an exported model, and what they would be densely."""
    sums = total(cost(model))
    return Cost(
        parameters=sums.parameters_dense,
        parameters_kept=sums.parameters_kept,
        flops=sums.flops_dense,
        flops_kept=sums.flops_kept,
    )


def latencies(
    dense: nn.Module,
    dense_model: Model,
    sparse_model: Model,
    image: torch.Tensor,
    *,
    threads: int,
    rounds: int,
    min_seconds: float,
) -> tuple[Latency, ...]:
    """Time one image in three engines that take turns.

    Parameters
    ----------
    dense
        The dense network, float32 on the CPU.
    dense_model, sparse_model
        The dense network and the pruned one, exported.
    image
        Float32 ``[1, C, H, W]``.
    threads
        For each engine.
    rounds, min_seconds
        The least number of turns each, and the least time in all, in seconds.

    Returns
    -------
    tuple of Latency
        Dense in PyTorch first.
    """
    dense.eval()
    pixels = np.ascontiguousarray(image.numpy())
    with (
        closing(load(dense_model, threads=threads)) as ours,
        closing(load(sparse_model, threads=threads)) as pruned,
    ):
        ours.warmup()
        pruned.warmup()

        def eager() -> object:
            with torch.inference_mode():
                return dense(image)

        candidates: dict[str, Callable[[], object]] = {
            DENSE_PYTORCH: eager,
            DENSE_RUNTIME: lambda: ours(pixels),
            SPARSE_RUNTIME: lambda: pruned(pixels),
        }
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            timings = interleave(candidates, rounds=rounds, min_seconds=min_seconds)
        finally:
            torch.set_num_threads(before)
    return tuple(
        Latency(name, timing.median_ms, timing.q1_ms, timing.q3_ms, timing.rounds)
        for name, timing in timings.items()
    )

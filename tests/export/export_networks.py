"""What the export tests share: random networks, pruning by definition, and the comparison."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from blocksparse.export import export_model
from blocksparse.format import Model
from blocksparse.runtime import load
from blocksparse.runtime.tolerance import tolerance


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give `model` weights of the usual scale and batch-norm statistics that folding must mind."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.weight.data[::3] *= -1
                module.bias.data.normal_(0, 0.3, generator=generator)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            scale = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data.normal_(0, scale, generator=generator)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def prunable(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the convolutions without groups and the linear layers."""
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and getattr(module, "groups", 1) == 1
    ]


def prune_blocks(model: nn.Module, sparsity: float, side: int = 8, seed: int = 0) -> None:
    """Zero random blocks of `side` x `side` channels, alike at every kernel position."""
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for weight in prunable(model):
            for k in range(0, weight.shape[0], side):
                for c in range(0, weight.shape[1], side):
                    if generator.random() < sparsity:
                        weight[k : k + side, c : c + side] = 0


def prune_groups(model: nn.Module, n: int, m: int, seed: int = 0) -> None:
    """Keep `n` random ones of every `m` input channels, at each output channel and position."""
    generator = torch.Generator().manual_seed(seed)
    for weight in prunable(model):
        flat = weight.data.reshape(*weight.shape[:2], -1)
        for start in range(0, flat.shape[1], m):
            group = flat[:, start : start + m]
            order = torch.rand(group.shape, generator=generator).argsort(1)
            group[order >= n] = 0


def assert_same_logits(model: nn.Module, exported: Model, images: torch.Tensor) -> None:
    """Compare the reference engine with PyTorch, on the whole batch and on the first image."""
    network = load(exported, engine="reference")
    for batch in (images, images[:1]):
        with torch.no_grad():
            expected = model(batch).numpy()
        allowed = tolerance(exported, float(np.abs(expected).max()))
        assert np.abs(network(batch.numpy()) - expected).max() <= allowed


def exported(model: nn.Module, shape: tuple[int, int, int], seed: int = 0) -> Model:
    """Export `model`, check its logits on three random images, and return the export."""
    result = export_model(model, shape)
    generator = torch.Generator().manual_seed(seed)
    assert_same_logits(model, result, torch.randn(3, *shape, generator=generator))
    return result


def ops(model: Model) -> list[str]:
    """Operations of a graph in execution order."""
    return [node.op for node in model.graph.nodes]

"""The networks that are measured: torchvision's with random weights, dense and block-sparse.

Speed depends on where zeros are, not on what the other weights say, so nothing is trained.
"""

# N images, C H W image

from __future__ import annotations

import copy

import torch
from torch import nn

from blocksparse.sparsity import Block, Floors, Pattern, plan_masks, resolve
from blocksparse.training import build_model, model_names, reestimate
from blocksparse.training.models import CIFAR_RESNETS

__all__ = ["default_image", "dense_network", "model_names", "pruned_network", "random_images"]

FITTING = 4  # images the batch norms are fitted to


def default_image(name: str) -> int:
    """Return height and width of the images a network was designed for, in pixels."""
    if name in CIFAR_RESNETS:
        return 32
    return 299 if name == "inception_v3" else 224


def random_images(count: int, image: int, seed: int) -> torch.Tensor:
    """Return normally distributed images, float32 [N, 3, H, W] with H = W = `image`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, 3, image, image), generator=generator)


def dense_network(name: str, image: int, seed: int) -> nn.Module:
    """Return a network with random weights, batch norms fitted, ready to run.

    Parameters
    ----------
    name : str
        One of `model_names()`; 1000 classes. Auxiliary heads, which only training uses, are left
        out.
    image : int
        Height and width of the images, in pixels.
    seed : int
        Of weights and fitting images.

    Returns
    -------
    nn.Module
        In evaluation mode.
    """
    torch.manual_seed(seed)
    options = {"aux_logits": False} if name in ("inception_v3", "googlenet") else {}
    network = build_model(
        name, num_classes=1000, input_shape=(3, image, image), options=options
    ).eval()
    return _fit(network, image, seed)


def pruned_network(
    network: nn.Module, sparsity: float, pattern: Block, image: int, seed: int
) -> tuple[nn.Module, dict[str, Pattern]]:
    """Return a copy of a network in which the blocks with the least weight are zero.

    Parameters
    ----------
    network : nn.Module
        Dense.
    sparsity : float
        Of the prunable weights, 0..1: the first convolution and the classifier stay dense.
    pattern : Block
        What is zero together.
    image, seed : int
        As for `dense_network`.

    Returns
    -------
    network : nn.Module
        In evaluation mode, batch norms fitted anew.
    patterns : dict of parameter name to Pattern
        What was pruned, so that the export need not find out.
    """
    network = copy.deepcopy(network)
    try:
        plan = resolve(network, target=sparsity, pattern=pattern)
    except ValueError:
        # Training keeps a block of every channel, so that none dies; narrow networks do not reach
        # 90 % then, SqueezeNet for one. Here only the number of zeros matters.
        floors = Floors(keep_channels=False)
        plan = resolve(network, target=sparsity, pattern=pattern, floors=floors)
    weights = plan.weights(network)
    with torch.no_grad():
        for name, mask in plan_masks(plan, weights, share=1.0).items():
            before = weights[name].norm()
            weights[name].mul_(mask)
            # As strong as before: without batch norms, signals would die from layer to layer.
            weights[name].mul_(before / weights[name].norm())
    return _fit(network, image, seed), plan.patterns()


def _fit(network: nn.Module, image: int, seed: int) -> nn.Module:
    """Fit the batch norms: without, signals grow or die, and comparing outputs says little."""
    images = random_images(FITTING, image, seed + 1)
    reestimate(network, [(images, torch.zeros(FITTING))])
    return network

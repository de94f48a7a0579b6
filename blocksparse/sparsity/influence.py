"""Influence: how much what the network puts out moves with each output channel of a layer."""

# N images   K output channels of a layer

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from blocksparse.sparsity.calibration import channel_axis
from blocksparse.sparsity.modes import evaluating

# Images that go back through the network at a time: as fast as all at once, in less memory.
_BATCH = 32


def influences(network: nn.Module, images: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
    """Return the mean squared gradients of the logits with respect to the outputs of layers.

    An error of mean square ``e`` in one output channel, independent from pixel to pixel, moves the
    logits by ``e`` times its influence, squared and summed. This is the diagonal of the
    Gauss-Newton matrix of the logits' squared error, estimated with one vector of random signs for
    each image (C. Bekas et al., "An estimator for the diagonal of a matrix", 2007).

    Parameters
    ----------
    network : nn.Module
        One that treats the images of a batch independently in evaluation mode, which is used.
    images : Tensor
        float32 [N, C, H, W], normalised as the network takes them, on its device.
    layers : collection of str
        Names of convolutions and linear layers.

    Returns
    -------
    dict
        By layer, [K]: the squared gradients, summed over pixels and logits, averaged over images;
        at least a millionth of the layer's mean, as no channel is worth nothing at all. Equal
        at each call.
    """
    modules = {name: network.get_submodule(name) for name in layers}
    outputs: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            outputs[name].append(output)
            # The kept one must not change when an activation behind it works in place.
            return output.clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    generator = torch.Generator().manual_seed(0)
    sums = {name: torch.zeros(()) for name in modules}
    try:
        with evaluating(network), torch.enable_grad():
            for batch in images.split(_BATCH):
                # Even where all weights are frozen there is something to differentiate by.
                logits = network(batch.detach().requires_grad_())
                signs = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1
                made = [(name, output) for name in list(outputs) for output in outputs.pop(name)]
                if not made:  # none of the layers runs; who prunes them says so
                    continue
                gradients = torch.autograd.grad(
                    logits, [output for _, output in made], signs.to(logits), allow_unused=True
                )
                for (name, _), gradient in zip(made, gradients, strict=True):
                    if gradient is not None:
                        axis = channel_axis(modules[name])
                        worth = gradient.square().movedim(axis, 0).flatten(1).sum(1)
                        sums[name] = sums[name].to(worth) + worth
    finally:
        for handle in handles:
            handle.remove()
    means = {name: total / len(images) for name, total in sums.items()}
    return {name: mean.clamp(min=float(mean.mean()) * 1e-6 or 1.0) for name, mean in means.items()}

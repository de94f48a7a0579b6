"""Masked weights: a network's pruned weights and their masks, which stay outside the network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from blocksparse.sparsity.masks import pack_mask, plan_masks, unpack_mask
from blocksparse.sparsity.plan import Plan


class MaskedWeights:
    """The masks of a plan, and what they do to a network.

    The network is not wrapped, parametrised or hooked: its parameters stay plain leaves and its
    state dict keeps its keys. So masks must be imposed again after whatever changed the weights.

    Parameters
    ----------
    plan : Plan
        What happens to every layer.
    packed : mapping of str to Tensor, optional
        Masks as packed bits by parameter name, as `packed` gives them; default: everything is kept.
    """

    def __init__(self, plan: Plan, packed: Mapping[str, Tensor] | None = None) -> None:
        self.plan = plan
        self.packed: dict[str, Tensor] = dict(packed or {})
        # Each pruned weight of the network that was last imposed on, and where it is zero.
        self._dropped: list[tuple[Tensor, Tensor]] | None = None

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks: bool on the CPU, True where kept, by parameter name."""
        shapes = {layer.param: layer.shape for layer in self.plan.pruned}
        return {param: unpack_mask(bits, shapes[param]) for param, bits in self.packed.items()}

    def build(self, network: nn.Module, share: float) -> dict[str, Tensor]:
        """Return packed masks for the weights as they are after ``share`` (0..1) of the ramp.

        What was dropped stays dropped. The ranking sees to that, as zeros come last in it; but of
        dropped units of different sizes it may find that fewer would do.
        """
        masks = plan_masks(self.plan, self.plan.weights(network), share)
        packed = {param: pack_mask(mask) for param, mask in masks.items()}
        return {param: bits & self.packed.get(param, bits) for param, bits in packed.items()}

    def adopt(self, packed: Mapping[str, Tensor]) -> None:
        """Take over masks that `build` returned."""
        self.packed = dict(packed)
        self.forget()

    def forget(self) -> None:
        """Let go of the network's tensors; the next `impose` looks them up again."""
        self._dropped = None

    @torch.no_grad()
    def impose(self, network: nn.Module) -> None:
        """Set every pruned weight to exactly +0.0, in place, even where it is NaN."""
        if self._dropped is None:
            weights = self.plan.weights(network)
            self._dropped = []
            for param, mask in self.masks.items():
                if not mask.all():
                    # In the memory format of the weight, so that filling is one pass over memory.
                    dropped = torch.empty_like(weights[param], dtype=torch.bool)
                    self._dropped.append((weights[param], dropped.copy_(~mask)))
        for weight, dropped in self._dropped:
            weight.masked_fill_(dropped, 0.0)

    @torch.no_grad()
    def count(self, network: nn.Module) -> dict[str, int]:
        """Return how many entries of each pruned parameter are zero, by name."""
        return {
            param: weight.numel() - int(torch.count_nonzero(weight))
            for param, weight in self.plan.weights(network).items()
        }

    def check_reached(self, zeros: Mapping[str, int]) -> None:
        """Compare the zeros that `count` found with the plan.

        Raises
        ------
        RuntimeError
            If there are fewer; names the layers that fall short.
        """
        short = [
            f"{layer.name} {zeros[layer.param] / layer.size:.4f} of {layer.target:.4f}"
            for layer in self.plan.pruned
            if layer.zeros is not None and zeros[layer.param] < layer.zeros
        ]
        total = sum(zeros.values())
        if short or total < self.plan.zeros:
            raise RuntimeError(
                f"the sparsity ramp has ended and the target is not reached: {total} of "
                f"{self.plan.prunable} weights are zero, and {self.plan.zeros} should be"
                + (f" (layers that fall short: {', '.join(short)})" if short else "")
                + ". Something changed the weights after the masks were imposed: look at the "
                "callbacks and hooks that write to them"
            )

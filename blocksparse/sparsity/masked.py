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
        # The weights of the network that was last looked at that are not wholly kept, by name, and
        # where they are zero.
        self._found: dict[str, tuple[Tensor, Tensor]] | None = None

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks: bool on the CPU, True where kept, by parameter name."""
        shapes = {layer.param: layer.shape for layer in self.plan.pruned}
        return {param: unpack_mask(bits, shapes[param]) for param, bits in self.packed.items()}

    def build(
        self, network: nn.Module, share: float, ranked: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return packed masks for the weights as they are after ``share`` (0..1) of the ramp.

        What was dropped stays dropped. The ranking sees to that, as zeros come last in it; but of
        dropped units of different sizes it may find that fewer would do.

        Parameters
        ----------
        network : nn.Module
            Of the plan.
        share : float
            How much of the way from the initial to the final zeros is done, 0..1.
        ranked : mapping of str to Tensor, optional
            What the plan's score ranks in place of the weights, by parameter name, of their shapes.
        """
        packed = self._build_freely(network, share, ranked)
        return {param: bits & self.packed.get(param, bits) for param, bits in packed.items()}

    def adopt(self, packed: Mapping[str, Tensor]) -> None:
        """Take over masks that `build` returned."""
        self.packed = dict(packed)
        self.forget()

    def forget(self) -> None:
        """Let go of the network's tensors; the next `impose` looks them up again."""
        self._found = None

    @torch.no_grad()
    def impose(self, network: nn.Module) -> None:
        """Set every pruned weight to exactly +0.0, in place, even where it is NaN."""
        for weight, dropped in self._look_up(network).values():
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

    def _build_freely(
        self, network: nn.Module, share: float, ranked: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        masks = plan_masks(self.plan, ranked or self.plan.weights(network), share)
        return {param: pack_mask(mask) for param, mask in masks.items()}

    def _look_up(self, network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the weights that are not wholly kept, and bool tensors, True where dropped."""
        if self._found is None:
            weights = self.plan.weights(network)
            self._found = {}
            for param, mask in self.masks.items():
                if not mask.all():
                    # In the memory format of the weight, so that filling is one pass over memory.
                    dropped = torch.empty_like(weights[param], dtype=torch.bool)
                    self._found[param] = weights[param], dropped.copy_(~mask)
        return self._found

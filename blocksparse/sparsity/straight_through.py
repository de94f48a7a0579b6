"""Straight-through masks: dropped weights are zero in the network, and go on learning beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from blocksparse.sparsity.masked import MaskedWeights
from blocksparse.sparsity.plan import Plan


class StraightThrough(MaskedWeights):
    """Masks over dense weights: what is dropped may come back when masks are built anew.

    Between two steps the network holds exact zeros, and the dropped values are held here. `restore`
    puts them back right before an optimizer steps, so that it moves all weights, by the gradients
    at the masked ones: the straight-through estimator. `impose` takes them out again.

    With masks built anew at every step and `add_decay` this is SR-STE (A. Zhou et al., "Learning
    N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021), for any pattern.
    With some steps between, it is gradual pruning with regrowth.

    Parameters
    ----------
    plan : Plan
        What happens to every layer.
    packed : mapping of str to Tensor, optional
        Masks as `packed` gives them; default: everything is kept.
    held : mapping of str to Tensor, optional
        Values of the dropped weights as `held` gives them; needed with ``packed``.
    """

    def __init__(
        self,
        plan: Plan,
        packed: Mapping[str, Tensor] | None = None,
        held: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(plan, packed)
        # Dense copies of the weights; only entries that are dropped count.
        self._held: dict[str, Tensor] = {}
        masks = self.masks
        for param, values in (held or {}).items():
            self._held[param] = values.new_zeros(masks[param].shape)
            self._held[param][~masks[param]] = values
        # Whether the network holds the dense weights and not the masked ones.
        self._dense = not packed

    @property
    def held(self) -> dict[str, Tensor]:
        """The values of the dropped weights, 1-D in row-major order, by parameter name."""
        return {
            param: self._held[param].cpu()[~mask]
            for param, mask in self.masks.items()
            if not mask.all()
        }

    def build(
        self, network: nn.Module, share: float, ranked: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return packed masks after ``share`` of the ramp; see `MaskedWeights.build`.

        To be called between `restore` and `impose`: it ranks the weights that it finds.
        """
        return self._build_freely(network, share, ranked)

    @torch.no_grad()
    def restore(self, network: nn.Module) -> None:
        """Put the dropped values back in place, if they are not there."""
        if self._dense:
            return
        for param, (weight, dropped) in self._look_up(network).items():
            torch.where(dropped, self._held[param], weight, out=weight)
        self._dense = True

    @torch.no_grad()
    def add_decay(self, network: nn.Module, decay: float, params: Collection[Tensor]) -> None:
        """Add ``decay * (1 - mask) * weight`` to gradients; to be called after `restore`.

        Parameters
        ----------
        network : nn.Module
            Of the plan.
        decay : float
            The paper's lambda_w.
        params : collection of Tensor
            Only weights among these, those of one optimizer, are looked at.
        """
        chosen = {id(param) for param in params}
        for weight, dropped in self._look_up(network).values():
            if weight.grad is not None and id(weight) in chosen:
                weight.grad.addcmul_(weight, dropped, value=decay)

    @torch.no_grad()
    def impose(self, network: nn.Module) -> None:
        """Hold the dropped values, and set them to exactly +0.0 in the network, in place."""
        if self._dense:
            for param, (weight, _) in self._look_up(network).items():
                if param in self._held:
                    self._held[param].copy_(weight)
                else:
                    self._held[param] = weight.detach().clone()
            self._dense = False
        super().impose(network)

    def _look_up(self, network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        if self._found is None:
            for param, (weight, _) in super()._look_up(network).items():
                held = self._held.get(param)
                if held is not None and (
                    held.device != weight.device or held.stride() != weight.stride()
                ):
                    # As the weight lies in memory: a step then is one pass over each.
                    self._held[param] = torch.empty_like(weight.detach()).copy_(held)
        return super()._look_up(network)

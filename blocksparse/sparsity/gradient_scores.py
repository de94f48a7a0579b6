"""Scores from gradients: what the steps of training say about each weight.

To first order, setting a weight w to zero changes the loss by ``-w * g``, where g is its gradient.

- ``taylor``: the mean of ``|w * g|`` over the steps (P. Molchanov et al., "Importance Estimation
  for Neural Network Pruning", CVPR 2019). What matters little to the loss goes.
- ``movement``: the sum of ``-w * g`` over the steps (V. Sanh et al., "Movement Pruning", NeurIPS
  2020). What training pushes towards zero goes. It is what a score per unit becomes that is trained
  straight through the mask, by plain gradient descent at a learning rate of 1.

Both rank units by the mean over their weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from blocksparse.sparsity.scores import Score, movement

# Steps over which `taylor` averages: older ones fade. Masks are built anew more often than that, or
# right after one another at the end of a ramp, and a few steps alone say little.
WINDOW = 100

# Kept weights rank above dropped ones, even if no gradient ever came their way.
_TINY = 1e-30


class GradientScores:
    """Gathers a gradient score of each pruned weight while training.

    Parameters
    ----------
    score : Score
        `taylor` or `movement`.
    state : mapping, optional
        What `state` gave in a former run.
    """

    def __init__(self, score: Score, state: Mapping[str, Any] | None = None) -> None:
        self.score = score
        self._values: dict[str, Tensor] = dict(state["values"]) if state else {}
        self._steps: dict[str, int] = dict(state["steps"]) if state else {}

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run needs: tensors of the weights' shapes on the CPU, and counts."""
        values = {param: value.cpu() for param, value in self._values.items()}
        return {"values": values, "steps": dict(self._steps)}

    @torch.no_grad()
    def add(self, weights: Mapping[str, Tensor], params: Collection[Tensor]) -> None:
        """Take in one step, after the gradients are there and before the weights change.

        Parameters
        ----------
        weights : mapping of str to Tensor
            The pruned parameters by name, dropped values in place if they learn.
        params : collection of Tensor
            Only weights among these, those of one optimizer, are looked at.
        """
        chosen = {id(param) for param in params}
        for param, weight in weights.items():
            if weight.grad is None or id(weight) not in chosen:
                continue
            steps = self._steps[param] = self._steps.get(param, 0) + 1
            if param not in self._values:
                self._values[param] = torch.zeros_like(weight, dtype=torch.float32)
            value = self._values[param] = self._values[param].to(weight.device)
            product = (weight * weight.grad).to(torch.float32)
            if self.score == movement:
                value.sub_(product)
            else:
                value.lerp_(product.abs_(), 1.0 / min(steps, WINDOW))

    def ranked(
        self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor] | None:
        """Return what `MaskedWeights.build` ranks in place of the weights.

        Parameters
        ----------
        weights : mapping of str to Tensor
            The pruned parameters by name.
        masks : mapping of str to Tensor or None
            Bool, True where kept: what is dropped already comes last. None: it has the same chance.

        Returns
        -------
        dict of str to Tensor or None
            Positive where kept, of the weights' shapes; None before the first step, when there is
            nothing to go by but the weights.

        Raises
        ------
        ValueError
            If a weight got no gradient.
        """
        if not self._values:
            return None
        result, lowest = {}, 0.0
        if self.score == movement:
            # Means over the weights of a unit keep their order when all weights rise alike; those
            # of all layers do, as a global allocation compares them.
            lowest = min(float(value.min()) for value in self._values.values())
        for param in weights:
            if param not in self._values:
                raise ValueError(
                    f"{param}: no gradient has come to it, so {self.score.name} cannot rank it. Is "
                    "it frozen? Leave it dense (sparsity.dense), or take sparsity.score=l2"
                )
            value = self._values[param]
            # MPS has no float64.
            value = value.to("cpu" if value.device.type == "mps" else value.device, torch.float64)
            value = (value - lowest).clamp(min=_TINY)
            if masks is not None and param in masks:
                value = value.masked_fill(~masks[param].to(value.device), 0.0)
            result[param] = value
        return result

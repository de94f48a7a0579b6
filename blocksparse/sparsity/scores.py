"""How much a group of weights matters: the L1 or L2 norm, per weight, of what stands for it.

That is the weights themselves, or what `gradient_scores` gathers of them during training.

A score is the mean, not the sum, over the weights it stands for. Dropping a ragged block at the
edge of a layer frees fewer weights than dropping a full one, and what the selection spends is
weights, so the question is always "how much is lost per weight freed", and ragged and full blocks
are comparable.

The sums run in float64 and the result is rounded to float32. For the same weights the order of
summation, which differs between machines and thread counts, is then lost in the rounding, and the
same weights give the same ranking everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """The p-norm of a group of weights, per weight: ``(sum |w|^p / count)^(1/p)``.

    Parameters
    ----------
    name : str
        What configs and tables call it.
    power : int
        p: 1 for the mean magnitude, 2 for the root mean square.
    gradients : bool
        Whether it is meant for what `GradientScores` gathers. Of weights it is a norm like others.

    Examples
    --------
    >>> l2(torch.tensor([[3.0, -4.0], [0.0, 0.0]]), dim=1)
    tensor([3.5355, 0.0000])
    """

    name: str
    power: int
    gradients: bool = False

    def terms(self, weight: Tensor) -> Tensor:
        """Return ``|w|^p`` entry by entry, float64 of the shape of ``weight``."""
        # MPS has no float64, and a CPU gives the same ranking as every other machine.
        device = "cpu" if weight.device.type == "mps" else weight.device
        wide = weight.detach().to(device).to(torch.float64, copy=True)
        return wide.abs_() if self.power == 1 else wide.square_()

    def root(self, total: Tensor, count: Tensor | int) -> Tensor:
        """Return the score of groups whose terms sum to ``total`` over ``count`` weights.

        Parameters
        ----------
        total : Tensor
            float64, sums of `terms`.
        count : Tensor or int
            How many real weights each sum stands for, at least 1, broadcast against ``total``.

        Returns
        -------
        Tensor
            float32, the shape of ``total``.
        """
        mean = total / count
        return (mean if self.power == 1 else mean.sqrt()).to(torch.float32)

    def __call__(self, weight: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
        """Return the score over ``dim`` (all axes if None), float32."""
        terms = self.terms(weight)
        if dim is None:
            dim = tuple(range(terms.ndim))
        total = terms.sum(dim)
        return self.root(total, terms.numel() // max(total.numel(), 1))


l1 = Score("l1", 1)
l2 = Score("l2", 2)
taylor = Score("taylor", 1, gradients=True)
movement = Score("movement", 1, gradients=True)

SCORES = {score.name: score for score in (l1, l2, taylor, movement)}


def score_named(name: str) -> Score:
    """Return the score that configs call ``name``.

    Raises
    ------
    ValueError
        If there is no such score; the text lists those there are.
    """
    try:
        return SCORES[name]
    except KeyError:
        known = ", ".join(sorted(SCORES))
        raise ValueError(f"unknown score {name!r}: choose one of {known}") from None

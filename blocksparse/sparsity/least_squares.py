"""Masked least squares: weights with zeros where a mask has them, whose outputs are closest."""

# K output channels   F inputs of one output: C * T, as in `calibration`   S of them that are kept
# G sets of inputs that go together, of J inputs each

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from blocksparse.sparsity.calibration import Moments


class MaskedLeastSquares:
    """Weights of one layer that come closest to what the layer was to give.

    That is, the least ``mean |w x - w_dense d - e|^2 + ridge |w - w_dense|^2`` per output channel,
    with x, d and e as in `Moments`. Rows with one mask share a Cholesky factorisation.

    Parameters
    ----------
    weight : Tensor
        [K, C, ...], the dense weights.
    moments : Moments
        Of the layer's inputs, in float64; all that follows is in float64 on their device.
    damping : float
        The ridge, as a fraction of the mean square of the inputs.

    Raises
    ------
    ValueError
        If the moments are not finite.
    """

    def __init__(self, weight: Tensor, moments: Moments, damping: float) -> None:
        if not all(bool(m.isfinite().all()) for m in (moments.inner, moments.cross, moments.rest)):
            raise ValueError(
                "its inputs on the calibration images are not finite: check the weights and the "
                "normalisation of the images"
            )
        dense = weight.detach().flatten(1).to(moments.inner)
        # Without any input that is not zero, the weights are as good as they were.
        ridge = damping * float(moments.inner.diagonal().mean()) or 1.0
        self.hessian = moments.inner + ridge * torch.eye(len(moments.inner)).to(moments.inner)
        self.goal = dense @ moments.cross + moments.rest + ridge * dense

    def solve(self, mask: Tensor) -> Tensor:
        """Return float64 [K, F], the best weights that are zero where ``mask``, bool [K, F], is."""
        weight = torch.zeros_like(self.goal)
        for rows, kept, factor in self._factors(mask):
            weight[rows[:, None], kept] = self._best(rows, kept, factor)
        return weight

    def losses(self, mask: Tensor, together: Tensor) -> Tensor:
        """Say what it costs to drop inputs that go together, after the others have made up for it.

        Parameters
        ----------
        mask : Tensor
            bool [K, F], what is kept now.
        together : Tensor
            int64 [F], equal for inputs that go together.

        Returns
        -------
        Tensor
            float64 [K, F], 0 where the mask is. For each output channel and set B of inputs, the
            squares sum to ``w_B^T ((H^-1)_BB)^-1 w_B``, H being the inputs' mean products with the
            ridge: what the least mean square difference grows by.
        """
        result = torch.zeros_like(self.goal)
        for rows, kept, factor in self._factors(mask):
            weight = self._best(rows, kept, factor)
            inverse = torch.cholesky_inverse(factor)
            for members in _sets(together[kept]):
                blocks = inverse[members[:, :, None], members[:, None, :]]
                # |L^-1 w|^2 = w^T (L L^T)^-1 w.
                white = torch.linalg.solve_triangular(
                    torch.linalg.cholesky(blocks), weight[:, members].permute(1, 2, 0), upper=False
                )
                result[rows[:, None, None], kept[members]] = white.permute(2, 0, 1)
        return result

    def _factors(self, mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield, for the rows that share a mask: the rows, inputs kept, Cholesky factor [S, S]."""
        masks, which = torch.unique(mask, dim=0, return_inverse=True)
        for index, shared in enumerate(masks):
            kept = shared.nonzero()[:, 0]
            if len(kept):
                rows = (which == index).nonzero()[:, 0]
                yield rows, kept, torch.linalg.cholesky(self.hessian[kept[:, None], kept])

    def _best(self, rows: Tensor, kept: Tensor, factor: Tensor) -> Tensor:
        """Return [rows, S], the best weights for one support."""
        return torch.cholesky_solve(self.goal[rows[:, None], kept].T, factor).T


def _sets(together: Tensor) -> Iterator[Tensor]:
    """Yield int64 [G, J]: the members of the sets, all those of J members at a time."""
    order = together.argsort(stable=True)
    _, sizes = together.unique(return_counts=True)
    starts = sizes.cumsum(0) - sizes
    for size in sizes.unique().tolist():
        yield order[starts[sizes == size][:, None] + torch.arange(size, device=order.device)]

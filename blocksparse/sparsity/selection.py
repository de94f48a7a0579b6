"""Selection: which units stay, given how many weights must go and what the floors protect."""

# U units   B D P block rows, block columns and positions, as in `patterns`

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blocksparse.sparsity.patterns import Pattern


@dataclass(frozen=True)
class Floors:
    """What every pruned layer keeps, whatever the target.

    Parameters
    ----------
    min_density : float
        Smallest fraction of a layer's weights that stays, 0..1.
    keep_channels : bool
        True: no block row and no block column of a layer loses everything, so that no group of
        output channels goes silent and none of the input channels goes unread. With a grid of B x D
        blocks that keeps max(B, D) of them. Single channels play the part of blocks when the
        pattern is unstructured. N:M patterns keep every channel by themselves.
    """

    min_density: float = 0.01
    keep_channels: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_density <= 1.0:
            raise ValueError(f"min_density is a fraction in 0..1, not {self.min_density}")


def keep_units(importance: Tensor, size: Tensor, protected: Tensor, zeros: int) -> Tensor:
    """Choose the units that stay so that at least ``zeros`` weights go.

    The least important units go first, and as few as it takes. Between equals the lower index is
    kept, so that the same weights give the same choice everywhere, and what goes at some ``zeros``
    also goes at any larger one.

    Parameters
    ----------
    importance : Tensor
        float32 [U].
    size : Tensor
        int64 [U], weights that go with each unit.
    protected : Tensor
        bool [U], units that stay in any case.
    zeros : int
        How many weights must go.

    Returns
    -------
    Tensor
        bool [U], True where the unit stays.

    Raises
    ------
    ValueError
        If what is not protected does not hold ``zeros`` weights.
    """
    keep = torch.ones_like(protected)
    if zeros <= 0:
        return keep
    order = _ranked(importance, protected)
    freed = size.masked_fill(protected, 0)[order].flip(0).cumsum(0)
    if len(freed) == 0 or int(freed[-1]) < zeros:
        available = int(freed[-1]) if len(freed) else 0
        raise ValueError(
            f"{zeros} weights must go, but the floors leave only {available} to choose"
        )
    dropped = int(torch.searchsorted(freed, zeros)) + 1
    keep[order[len(order) - dropped :]] = False
    return keep


def protect(
    pattern: Pattern, shape: tuple[int, ...], importance: Tensor, size: Tensor, floors: Floors
) -> Tensor:
    """Return bool [U]: the units of a weight of ``shape`` that the floors keep.

    What is protected depends on the weights alone and not on the target. So a mask at a higher
    sparsity stays a subset of the mask at a lower one.
    """
    protected = torch.zeros(len(importance), dtype=torch.bool, device=importance.device)
    grid = pattern.grid(shape)
    if floors.keep_channels and grid is not None:
        best = importance.reshape(grid).cpu().numpy()
        protected |= torch.from_numpy(channel_cover(best)).to(protected.device)
    allowed = math.floor(round(math.prod(shape) * (1.0 - floors.min_density), 6))
    free = size.masked_fill(protected, 0)
    if int(free.sum()) > allowed:
        order = _ranked(importance, protected)
        freed = free[order].flip(0).cumsum(0)
        droppable = int(torch.searchsorted(freed, allowed, right=True))
        protected[order[: len(order) - droppable]] = True
    return protected


def most_zeros(pattern: Pattern, shape: tuple[int, ...], floors: Floors) -> int:
    """Return how many weights of ``shape`` can go under ``floors``, whatever the weights are.

    Exact where all units have one size. With ragged edges the protected units may be large or
    small ones, and this is what is left if they are as large as can be.
    """
    size = pattern.sizes(shape)
    total = int(size.sum())
    largest = int(size.max()) if len(size) else 0
    if largest == 0:
        return 0
    covered = 0
    grid = pattern.grid(shape)
    if floors.keep_channels and grid is not None:
        # The cover holds one unit of every block row, or of every block column if those are more.
        widths = size.reshape(grid).amax(2)
        covered = int(widths.amax(1 if grid[0] >= grid[1] else 0).sum())
    most = total - covered
    allowed = math.floor(round(math.prod(shape) * (1.0 - floors.min_density), 6))
    if allowed < total:
        ragged = int(size[size > 0].min()) != largest
        # Dropping unit by unit stops short of `allowed` by less than one unit.
        reachable = allowed - largest + 1 if ragged else allowed // largest * largest
        most = min(most, max(reachable, 0))
    return most


def channel_cover(importance: np.ndarray) -> np.ndarray:
    """Choose the fewest units that leave no block row and no block column empty.

    Greedily, the most important first: a unit is taken if neither its row nor its column has one.
    Rows or columns that remain take their most important unit. That makes max(B, D) units.

    Parameters
    ----------
    importance : ndarray
        float32 [B, D, P], none negative.

    Returns
    -------
    ndarray
        bool [B * D * P], True where the unit is taken.
    """
    rows, cols, positions = importance.shape
    where = importance.argmax(2)
    best = np.take_along_axis(importance, where[:, :, None], 2)[:, :, 0]
    row_left, col_left = np.arange(rows), np.arange(cols)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    # Greedy takes a unit when it comes before every other unit of its row and of its column. All
    # those that do at a time can be taken at once. numpy's argmax gives the first of equals.
    left = best
    while len(row_left) and len(col_left):
        col_of_row, row_of_col = left.argmax(1), left.argmax(0)
        mutual = np.flatnonzero(row_of_col[col_of_row] == np.arange(len(row_left)))
        pairs.append((row_left[mutual], col_left[col_of_row[mutual]]))
        row_left = np.delete(row_left, mutual)
        col_left = np.delete(col_left, col_of_row[mutual])
        left = np.delete(np.delete(left, mutual, 0), col_of_row[mutual], 1)
    pairs.append((row_left, best[row_left].argmax(1)))
    pairs.append((best[:, col_left].argmax(0), col_left))
    taken = np.zeros(importance.shape, dtype=bool)
    for row, col in pairs:
        taken[row, col, where[row, col]] = True
    return taken.reshape(rows * cols * positions)


def _ranked(importance: Tensor, protected: Tensor) -> Tensor:
    """Return int64 [U], the units from what stays longest to what goes first."""
    ranked = importance.masked_fill(protected, math.inf)
    return ranked.sort(descending=True, stable=True).indices

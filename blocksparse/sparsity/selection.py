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
    if zeros <= 0:
        return torch.ones_like(protected)
    free = size.masked_fill(protected, 0)
    available = int(free.sum())
    if available < zeros:
        raise ValueError(
            f"{zeros} weights must go, but the floors leave only {available} to choose"
        )
    each = _common(size)
    if each:
        return ~_goes_first(importance, protected, -(-zeros // each))
    order = _ranked(importance, protected)
    dropped = int(torch.searchsorted(free[order].flip(0).cumsum(0), zeros)) + 1
    keep = torch.ones_like(protected)
    keep[order[len(order) - dropped :]] = False
    return keep


def protect(
    pattern: Pattern,
    shape: tuple[int, ...],
    importance: Tensor,
    size: Tensor,
    floors: Floors,
    zeros: int | None = None,
) -> Tensor:
    """Return bool [U]: the units of a weight of ``shape`` that the floors keep.

    What is protected depends on the weights alone and not on the target. So a mask at a higher
    sparsity stays a subset of the mask at a lower one.

    With ``zeros``, how many weights `keep_units` will be asked to drop, ``min_density`` is not
    worked out where so few zeros cannot break it; the choice of `keep_units` is the same.
    """
    protected = torch.zeros(len(importance), dtype=torch.bool, device=importance.device)
    grid = pattern.grid(shape)
    if floors.keep_channels and grid is not None:
        best = importance.reshape(grid).cpu().numpy()
        protected |= torch.from_numpy(channel_cover(best)).to(protected.device)
    allowed = math.floor(round(math.prod(shape) * (1.0 - floors.min_density), 6))
    # What goes exceeds `zeros` by less than one unit.
    if len(size) == 0 or (zeros is not None and zeros + int(size.max()) - 1 <= allowed):
        return protected
    free = size.masked_fill(protected, 0)
    if int(free.sum()) > allowed:
        each = _common(size)
        if each:
            return ~_goes_first(importance, protected, allowed // each)
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
    """Choose the fewest units that leave no block row and no block column empty: max(B, D).

    Greedily, the most important first: a unit is taken if neither its row nor its column has one.
    Rows or columns that remain take their most important unit. Units that are zero already are
    taken only where the others cannot make a cover of that size, so that what was dropped at an
    earlier update is not called back.

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
    if positions == 1:
        where, best = np.zeros((rows, cols), dtype=np.int64), importance[:, :, 0]
    else:
        where = importance.argmax(2)
        best = np.take_along_axis(importance, where[:, :, None], 2)[:, :, 0]
    # mates[r] is the block column that block row r is matched with, -1 if none.
    mates = _match_greedily(best)
    free_rows = np.flatnonzero(mates < 0)
    edges = best > 0.0
    for free_row in free_rows:
        _augment(edges, mates, int(free_row))
    # No room is left for them, so that all units between these rows and columns are zero: equals,
    # that go by index.
    free_rows = np.flatnonzero(mates < 0)
    free_cols = np.setdiff1d(np.arange(cols), mates)
    pairs = min(len(free_rows), len(free_cols))
    mates[free_rows[:pairs]] = free_cols[:pairs]
    free_rows, free_cols = free_rows[pairs:], free_cols[pairs:]
    mates[free_rows] = best[free_rows].argmax(1)
    taken = np.zeros(importance.shape, dtype=bool)
    for row, col in ((np.arange(rows), mates), (best[:, free_cols].argmax(0), free_cols)):
        taken[row, col, where[row, col]] = True
    return taken.reshape(rows * cols * positions)


def _match_greedily(best: np.ndarray) -> np.ndarray:
    """Match rows with columns, the most important unit first, zeros not; -1 for rows without one.

    Greedy takes a unit when it comes before all others of its row and of its column. All that do so
    at a time are taken at once. numpy's argmax gives the first of equals, so ties go by index.
    """
    mates = np.full(best.shape[0], -1)
    rows, cols = np.arange(best.shape[0]), np.arange(best.shape[1])
    left = best  # shrinks with the rows and columns, so that all rounds cost little more than one
    while left.size:
        choice = left.argmax(1)
        mutual = left.argmax(0)[choice] == np.arange(len(rows))
        mutual &= left[np.arange(len(rows)), choice] > 0.0
        if not mutual.any():
            break
        mates[rows[mutual]] = cols[choice[mutual]]
        stays = np.ones(len(cols), dtype=bool)
        stays[choice[mutual]] = False
        left = left[~mutual][:, stays]
        rows, cols = rows[~mutual], cols[stays]
    return mates


def _augment(edges: np.ndarray, mates: np.ndarray, row: int) -> None:
    """Match a free row over ``edges``, in place, if others can make room (H. W. Kuhn, 1955).

    If they cannot, no later row gets room there either, and the columns lose their edges: so all
    searches in vain together look at each column once.
    """
    row_of_col = np.full(edges.shape[1], -1)
    matched = np.flatnonzero(mates >= 0)
    row_of_col[mates[matched]] = matched
    came_from = np.full(edges.shape[1], -1)
    queue = [row]
    for current in queue:
        reached = np.flatnonzero(edges[current] & (came_from < 0))
        came_from[reached] = current
        free = reached[row_of_col[reached] < 0]
        if len(free):
            col = int(free[0])
            while col >= 0:
                giver = int(came_from[col])
                mates[giver], col = col, int(mates[giver])
            return
        queue.extend(row_of_col[reached].tolist())
    edges[:, came_from >= 0] = False


def _common(size: Tensor) -> int:
    """Return the size that all units have, 0 if they differ."""
    largest = int(size.max())
    return largest if int(size.min()) == largest else 0


def _goes_first(importance: Tensor, protected: Tensor, count: int) -> Tensor:
    """Return bool [U]: the ``count`` units that go first, the last of `_ranked`, without a sort.

    All below the ``count``-th smallest importance go, and of those that equal it the last. For the
    8 million weights of a 2048x4096 layer, one by one, a mask takes 0.8 s on one core, not 4.3 s.
    """
    goes = torch.zeros_like(protected)
    if count == 0:
        return goes
    ranked = importance.masked_fill(protected, math.inf)
    if ranked.device.type == "cpu":  # np.partition takes seven times as long if most are zero
        bound = float(ranked.kthvalue(count).values)
    else:  # sorts fast, and kthvalue is refused by torch.use_deterministic_algorithms
        bound = float(ranked.sort().values[count - 1])
    torch.lt(ranked, bound, out=goes)
    equals = (ranked == bound).nonzero()[:, 0]
    goes[equals[len(equals) - (count - int(goes.sum())) :]] = True
    return goes


def _ranked(importance: Tensor, protected: Tensor) -> Tensor:
    """Return int64 [U], the units from what stays longest to what goes first."""
    ranked = importance.masked_fill(protected, math.inf)
    return ranked.sort(descending=True, stable=True).indices

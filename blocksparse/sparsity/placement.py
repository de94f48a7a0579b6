"""What a strand of channels is worth at each place of its group, for every layer it runs through.

Let f[x] be what strand x brings to the units of a layer (its energy in each block column, say), and
t[s] what it takes at place s before any of it is kept. What the layer keeps with strand x at place
s is then, up to a constant of the place, the sum over r of max(f[x, r] - t[s, r], 0):

- Blocks: a block is kept once its energy passes the bound that the layer's target sets; t is the
  bound less the energy of the others in the block.
- N:M: an entry is kept if it is among the n largest; t is the n-th largest of the others.

So the gain of exchanging two strands is exact as long as the bound of the layer stays. (Channel
permutations for N:M go back to Pool and Yu, NeurIPS 2021, who search by exchanges as well.)
"""

# K C T output channels, input channels and kernel positions of a weight, n strands, R units that a
# strand is part of, B block rows or columns along the axis, m as in N:M

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numba import njit

from blocksparse.sparsity.patterns import Block, Pattern, VectorNM
from blocksparse.sparsity.selection import channel_cover


class Term(ABC):
    """What one layer says about the order of a group along one of its axes.

    Attributes
    ----------
    bins : ndarray
        int64 [n], the block or N:M group that each place lies in.
    """

    bins: np.ndarray

    @abstractmethod
    def add_worth(self, places: np.ndarray, worth: np.ndarray) -> None:
        """Add to ``worth[places]``, float32 [n, n], what each strand is worth at these places."""

    @abstractmethod
    def swap(self, one: np.ndarray, other: np.ndarray) -> None:
        """Exchange the strands at places ``one`` and ``other``, which share no bin."""


class BlockTerm(Term):
    """Blocks along an axis.

    Parameters
    ----------
    brings : ndarray
        float32 [length of the axis, R], energy by index along the axis and block of the other one.
    places : ndarray
        int64 [n], indices along the axis of the group's places.
    width : int
        Indices in a block.
    bound : ndarray
        float32 [B, R], the energy from which a block is kept.
    """

    def __init__(
        self, brings: np.ndarray, places: np.ndarray, width: int, bound: np.ndarray
    ) -> None:
        self.bins = places // width
        starts = np.arange(0, len(brings), width)
        self._lack = bound - np.add.reduceat(brings, starts, axis=0)
        self._brings = brings[places]

    def add_worth(self, places: np.ndarray, worth: np.ndarray) -> None:
        """Add what each strand is worth; see `Term`."""
        takes = self._lack[self.bins[places]] + self._brings[places]
        _add_excess(self._brings, takes, places, worth)

    def swap(self, one: np.ndarray, other: np.ndarray) -> None:
        """Exchange strands; see `Term`."""
        change = self._brings[other] - self._brings[one]
        self._lack[self.bins[one]] -= change
        self._lack[self.bins[other]] += change
        self._brings[one] += change
        self._brings[other] -= change


class NMTerm(Term):
    """N:M groups along the input channels.

    Parameters
    ----------
    brings : ndarray
        float32 [C, R], energy by input channel and by kernel position and vector of outputs.
    places : ndarray
        int64 [n], the input channels of the group's places.
    n, m : int
        At most n of m are kept.
    """

    def __init__(self, brings: np.ndarray, places: np.ndarray, n: int, m: int) -> None:
        self.bins = places // m
        self._keeps = n
        self._width = m
        self._places = places
        self._all = np.zeros((-(-len(brings) // m) * m, brings.shape[1]), dtype=np.float32)
        self._all[: len(brings)] = brings

    def add_worth(self, places: np.ndarray, worth: np.ndarray) -> None:
        """Add what each strand is worth; see `Term`."""
        bins, where = np.unique(self.bins[places], return_inverse=True)
        full = self._all.reshape(-1, self._width, self._all.shape[1])[bins]
        ranked = np.sort(full, axis=1)[:, ::-1]
        last, next_best = ranked[:, self._keeps - 1], ranked[:, self._keeps]
        own = self._all[self._places[places]]
        takes = np.where(own >= last[where], next_best[where], last[where])
        _add_excess(self._all[self._places], takes, places, worth)

    def swap(self, one: np.ndarray, other: np.ndarray) -> None:
        """Exchange strands; see `Term`."""
        at, to = self._places[one], self._places[other]
        self._all[np.r_[at, to]] = self._all[np.r_[to, at]]


class VectorTerm(Term):
    """Output channels that share the choice of a vector-wise N:M pattern.

    The choice as it is gives a lower bound of what is kept after an exchange.

    Parameters
    ----------
    brings : ndarray
        float32 [K, groups, m], energy by output channel, by group of input channels and kernel
        position, and by input channel in the group.
    places : ndarray
        int64 [n], the output channels of the group's places.
    vector, n : int
        Output channels that share a choice, and how many of m it keeps.
    """

    def __init__(self, brings: np.ndarray, places: np.ndarray, vector: int, n: int) -> None:
        self.bins = places // vector
        self._keeps = n
        self._sums = np.add.reduceat(brings, np.arange(0, len(brings), vector), axis=0)
        self._brings = brings[places]

    def add_worth(self, places: np.ndarray, worth: np.ndarray) -> None:
        """Add what each strand is worth; see `Term`."""
        bins, where = np.unique(self.bins[places], return_inverse=True)
        sums = self._sums[bins]
        order = np.argsort(-sums, axis=-1, kind="stable")[..., : self._keeps]
        kept = np.zeros_like(sums)
        np.put_along_axis(kept, order, 1.0, axis=-1)
        flat = self._brings.reshape(len(self._brings), -1)
        worth[places] += (kept.reshape(len(kept), -1) @ flat.T)[where]

    def swap(self, one: np.ndarray, other: np.ndarray) -> None:
        """Exchange strands; see `Term`."""
        change = self._brings[other] - self._brings[one]
        self._sums[self.bins[one]] += change
        self._sums[self.bins[other]] -= change
        self._brings[one] += change
        self._brings[other] -= change


class Layer:
    """The energy of one pruned layer, in the order its channels have now.

    Parameters
    ----------
    energy : ndarray
        float32 [K, C, T], not negative. Taken as a share of its sum, so that layers compare.
    pattern : Pattern
        What the layer is pruned with.
    zeros : int
        How many of its weights go.
    keep_channels : bool
        Whether no block row and no block column goes wholly; see `Floors`.
    """

    def __init__(
        self, energy: np.ndarray, pattern: Pattern, zeros: int, keep_channels: bool = False
    ) -> None:
        self.energy = energy / max(float(energy.sum(dtype=np.float64)), 1e-30)
        self.pattern = pattern
        self.zeros = zeros
        self.keep_channels = keep_channels

    def reorder(self, axis: int, places: np.ndarray, order: np.ndarray) -> None:
        """Put what lies at ``places[order]`` to ``places``, along an axis."""
        index = np.arange(self.energy.shape[axis])
        index[places] = places[order]
        self.energy = self.energy.take(index, axis=axis)

    def kept(self) -> float:
        """Return the share of the energy that stays when `zeros` weights go.

        As the masks have it, but for the floor ``min_density``, and for N:M in which only a share
        of the groups obeys.
        """
        if isinstance(self.pattern, VectorNM):
            ranked = np.sort(self._vectors(), axis=-1)
            return float(ranked[..., -self.pattern.n :].sum(dtype=np.float64))
        assert isinstance(self.pattern, Block)
        energy, size = self._blocks()
        order, dropped, _ = self._ranked(energy / size, size)
        return 1.0 - float(energy.reshape(-1)[order[:dropped]].sum(dtype=np.float64))

    def term(self, axis: int, places: np.ndarray, most: int) -> Term | None:
        """Return what the layer says about the order of ``places`` along ``axis``.

        Of more than ``most`` units a sample is taken. None if the order does not matter.
        """
        pattern = self.pattern
        if isinstance(pattern, VectorNM):
            if axis == 1:
                brings = _sums(self.energy, 0, pattern.vector).transpose(1, 0, 2)
                brings = _sampled(brings.reshape(brings.shape[0], -1), most)
                return NMTerm(brings, places, pattern.n, pattern.m)
            if pattern.vector == 1:
                return None
            return VectorTerm(self._grouped(self.energy), places, pattern.vector, pattern.n)
        assert isinstance(pattern, Block)
        width, other = (pattern.rows, pattern.cols)[:: 1 if axis == 0 else -1]
        if width == 1:
            return None
        blocks, size = self._blocks()
        order, dropped, covered = self._ranked(blocks / size, size)
        # Halfway between the last block that goes and the first that need not stay.
        border = order[max(dropped - 1, 0) : dropped + 1]
        level = float((blocks / size).reshape(-1)[border].mean()) if len(border) else 0.0
        energy = self.energy.sum(2, keepdims=True) if pattern.shared else self.energy
        brings = _sums(energy, 1 - axis, other)
        bound = np.where(covered, np.float32(0.0), np.float32(level) * size)
        if axis == 1:
            brings, bound = brings.swapaxes(0, 1), bound.swapaxes(0, 1)
        return BlockTerm(
            _sampled(brings.reshape(len(brings), -1), most),
            places,
            width,
            _sampled(bound.reshape(len(bound), -1), most),
        )

    def _blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the energy and the number of weights of each block: float32 [B, D, P]."""
        assert isinstance(self.pattern, Block)
        outs, ins, taps = self.energy.shape
        energy = self.energy.sum(2, keepdims=True) if self.pattern.shared else self.energy
        energy = _sums(_sums(energy, 0, self.pattern.rows), 1, self.pattern.cols)
        size = self.pattern.sizes((outs, ins, taps)).numpy().reshape(energy.shape)
        return energy, size.astype(np.float32)

    def _ranked(self, rate: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
        """Rank the blocks by what is lost for each weight.

        Parameters
        ----------
        rate, size : ndarray
            float32 [B, D, P], energy for each weight, and weights.

        Returns
        -------
        order : ndarray
            int64, the blocks that may go, the least first.
        dropped : int
            How many of them go.
        covered : ndarray
            bool [B, D, P], the blocks that stay whatever they hold.
        """
        covered = np.zeros(rate.shape, dtype=bool)
        if self.keep_channels:
            covered = channel_cover(rate).reshape(rate.shape)
        order = np.argsort(np.where(covered, np.inf, rate).reshape(-1), kind="stable")
        order = order[: order.size - int(covered.sum())]
        freed = size.reshape(-1)[order].cumsum(dtype=np.float64)
        dropped = int(np.searchsorted(freed, self.zeros)) + 1 if self.zeros > 0 else 0
        return order, min(dropped, len(order)), covered

    def _vectors(self) -> np.ndarray:
        """Return the energy of each choice of a vector-wise N:M pattern: float32 [V, groups, m]."""
        assert isinstance(self.pattern, VectorNM)
        return self._grouped(_sums(self.energy, 0, self.pattern.vector))

    def _grouped(self, energy: np.ndarray) -> np.ndarray:
        """Cut the input channels of [rows, C, T] into N:M groups: [rows, groups, m]."""
        assert isinstance(self.pattern, VectorNM)
        rows, ins, taps = energy.shape
        width = self.pattern.m
        full = np.zeros((rows, taps, -(-ins // width) * width), dtype=np.float32)
        full[:, :, :ins] = energy.transpose(0, 2, 1)
        return full.reshape(rows, -1, width)


def _sums(values: np.ndarray, axis: int, width: int) -> np.ndarray:
    """Sum every ``width`` neighbours along an axis, the last ones as many as there are."""
    if width == 1:
        return values
    return np.add.reduceat(values, np.arange(0, values.shape[axis], width), axis=axis)


def _sampled(values: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many columns, evenly spread, scaled so that sums stay about the same."""
    columns = values.shape[1]
    if columns <= most:
        return np.ascontiguousarray(values, dtype=np.float32)
    chosen = np.linspace(0, columns - 1, most).round().astype(np.int64)
    return np.ascontiguousarray(values[:, chosen], dtype=np.float32) * np.float32(columns / most)


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _add_excess(
    brings: np.ndarray, takes: np.ndarray, places: np.ndarray, worth: np.ndarray
) -> None:
    """Add sum_r max(brings[x, r] - takes[p, r], 0) to worth[places[p], x]."""
    # Ten times as fast as torch.cdist, of which it is a sum of two: 4 G entries/s on one core.
    for p in range(len(places)):
        for x in range(brings.shape[0]):
            total = np.float32(0.0)
            for r in range(brings.shape[1]):
                total += max(brings[x, r] - takes[p, r], np.float32(0.0))
            worth[places[p], x] += total


@njit(cache=True, nogil=True)
def best_mates(worth: np.ndarray, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the place that each place gains most by exchanging strands with.

    Parameters
    ----------
    worth : ndarray
        float32 [n, n], what the strand that is now at each place (second axis) is worth at each
        place (first axis).
    bins : ndarray
        int64 [cuts, n]; places that share a bin in any of the cuts do not exchange.

    Returns
    -------
    mates : ndarray
        int64 [n]
    gains : ndarray
        float32 [n], what the exchange gains; 0 where none gains.
    """
    size = len(worth)
    mates = np.arange(size)
    gains = np.zeros(size, dtype=np.float32)
    # Columns are read in pieces of rows: a sixth of the time of whole arrays in NumPy.
    for start in range(0, size, 32):
        for mate in range(size):
            for place in range(start, min(start + 32, size)):
                gain = worth[place, mate] + worth[mate, place]
                gain -= worth[place, place] + worth[mate, mate]
                if gain > gains[place]:
                    apart = True
                    for cut in range(len(bins)):
                        apart = apart and bins[cut, place] != bins[cut, mate]
                    if apart:
                        mates[place] = mate
                        gains[place] = gain
    return mates, gains

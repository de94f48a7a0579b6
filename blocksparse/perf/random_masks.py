"""Random masks in the patterns of training, made with NumPy: what a pruned weight looks like.

Which blocks survive a training is not known before it, and makes hardly a difference to the time a
kernel takes: that depends on how many there are. So random ones stand in for them. The rules are
those of `blocksparse.sparsity`, which needs PyTorch: a layer loses at least what is asked, by less
than one block more, and no block row and no block column of it loses everything.
"""

# K output channels (O of a linear layer)   C input channels (I of a linear layer)
# T kernel positions, 1 for a linear layer   V vectors of output channels   G groups of m channels
# B D block rows and block columns, ragged last ones included; P positions: T, or 1 if shared

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil, prod
from typing import Protocol

import numpy as np
import numpy.typing as npt

from blocksparse.format import BsrWeight, NMWeight, Weight

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

SPELLINGS = (
    "block8x8, block8x8_per_position, nm2:4 (or nm24), vector_nm2:4 (or vector_nm24), "
    "unstructured; sizes are free"
)
"""What :func:`parse_pattern` reads: the names of ``sparsity=`` in training, with any sizes."""

VECTOR = 8  # output channels that share a choice in vector-wise N:M, as in configs/sparsity


class Pattern(Protocol):
    """Which weights may be zero together, in weights [K, C, R, S] and [O, F]."""

    @property
    def fixed_sparsity(self) -> float | None:
        """The sparsity of a pattern that has only one; None where it can be chosen."""

    def refusal(self, shape: tuple[int, ...]) -> str:
        """Say why nothing can be dropped from a weight of `shape`; "" if something can."""

    def mask(self, shape: tuple[int, ...], sparsity: float, random: np.random.Generator) -> Mask:
        """Return a mask of `shape`, True where a weight stays; `sparsity` is a share in 0..1."""

    def store(self, weight: Floats) -> Weight:
        """Return a masked weight in the layout that an export gives this pattern."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of `rows` output by `cols` input channels, kept or dropped whole.

    Parameters
    ----------
    rows, cols : int
        Size of a block. Where the channels do not divide, the last block is smaller.
    shared : bool
        One choice for all kernel positions, or one for each.
    """

    rows: int = 8
    cols: int = 8
    shared: bool = True

    def __str__(self) -> str:
        return f"block {self.rows}x{self.cols} {'shared' if self.shared else 'per position'}"

    @property
    def fixed_sparsity(self) -> None:
        """Any sparsity can be had."""
        return

    def refusal(self, shape: tuple[int, ...]) -> str:
        """Say why nothing can be dropped from a weight of `shape`; "" if something can."""
        block_rows, block_cols, positions = self._grid(shape)
        if block_rows * block_cols * positions == max(block_rows, block_cols):
            return f"the floors keep every unit of {self}"
        return ""

    def mask(self, shape: tuple[int, ...], sparsity: float, random: np.random.Generator) -> Mask:
        """Return a mask of `shape`, True where a weight stays.

        The blocks go in one random order, so that with the same generator a mask at a higher
        sparsity is a subset of one at a lower.
        """
        outs, ins, taps = shape[0], shape[1], prod(shape[2:])
        grid = self._grid(shape)
        height, width = _chunks(outs, self.rows), _chunks(ins, self.cols)
        per_block = height[:, None, None] * width[:, None] * (taps if self.shared else 1)
        size = np.broadcast_to(per_block, grid).reshape(-1)
        cover = _cover(grid, random)
        order = random.permutation(np.setdiff1d(np.arange(size.size), cover))
        gone = np.cumsum(size[order])
        wanted = ceil(round(sparsity * prod(shape), 6))
        dropped = int(np.searchsorted(gone, wanted)) + 1 if wanted else 0
        keep = np.ones(size.size, np.bool_)
        keep[order[:dropped]] = False
        blocks = keep.reshape(grid).repeat(self.rows, 0)[:outs].repeat(self.cols, 1)[:, :ins]
        return np.broadcast_to(blocks, (outs, ins, taps)).reshape(shape)

    def store(self, weight: Floats) -> Weight:
        """Return a masked weight as BSR."""
        return BsrWeight.from_dense(weight, (self.rows, self.cols))

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return B, D, P."""
        positions = 1 if self.shared else prod(shape[2:])
        return ceil(shape[0] / self.rows), ceil(shape[1] / self.cols), positions


@dataclass(frozen=True)
class Groups:
    """At most `n` of every `m` consecutive input channels, alike in `vector` output channels.

    Parameters
    ----------
    n, m : int
        1 <= n < m <= 256.
    vector : int
        Output channels that share one choice; 1 is plain N:M.
    """

    n: int = 2
    m: int = 4
    vector: int = 1

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (f" x {self.vector} outputs" if self.vector > 1 else "")

    @property
    def fixed_sparsity(self) -> float:
        """1 - n/m, when every group obeys."""
        return 1 - self.n / self.m

    def refusal(self, shape: tuple[int, ...]) -> str:
        """Say why nothing can be dropped from a weight of `shape`; "" if something can."""
        return f"no group has more inputs than {self} keeps" if shape[1] <= self.n else ""

    def mask(self, shape: tuple[int, ...], sparsity: float, random: np.random.Generator) -> Mask:
        """Return a mask of `shape`, True where a weight stays; every group obeys."""
        outs, ins, taps = shape[0], shape[1], prod(shape[2:])
        groups = ceil(ins / self.m)
        rank = random.random((ceil(outs / self.vector), taps, groups * self.m), np.float32)
        rank[..., ins:] = 2  # behind every channel that exists
        grouped = rank.reshape(*rank.shape[:2], groups, self.m)
        keep = np.zeros(grouped.shape, np.bool_)
        first = np.argpartition(grouped, self.n - 1, axis=-1)[..., : self.n]
        np.put_along_axis(keep, first, True, axis=-1)
        channels = keep.reshape(rank.shape)[..., :ins].repeat(self.vector, 0)[:outs]
        return channels.transpose(0, 2, 1).reshape(shape)

    def store(self, weight: Floats) -> Weight:
        """Return a masked weight as packed N:M, or as BSR of `vector` x 1."""
        if self.vector > 1:
            return BsrWeight.from_dense(weight, (self.vector, 1))
        return NMWeight.from_dense(weight, self.n, self.m)


def parse_pattern(text: str) -> Blocks | Groups:
    """Return the pattern of a name such as ``block8x8``; see :data:`SPELLINGS`.

    Raises
    ------
    ValueError
        If there is no such pattern.

    Examples
    --------
    >>> print(parse_pattern("block16x4_per_position"), parse_pattern("vector_nm1:4"), sep=", ")
    block 16x4 per position, 1:4 x 8 outputs
    """
    if text == "unstructured":
        return Blocks(1, 1, shared=False)
    if found := re.fullmatch(r"block(\d{1,4})x(\d{1,4})(_per_position)?", text):
        rows, cols = int(found[1]), int(found[2])
        if min(rows, cols) < 1:
            raise ValueError(f"pattern {text!r}: a block needs at least 1 row and 1 column")
        return Blocks(rows, cols, shared=found[3] is None)
    if found := re.fullmatch(r"(vector_)?nm(?:(\d)(\d)|(\d{1,3}):(\d{1,3}))", text):
        n, m = int(found[2] or found[4]), int(found[3] or found[5])
        if not 1 <= n < m <= 256:
            raise ValueError(f"pattern {text!r}: N:M needs 1 <= n < m <= 256, not {n}:{m}")
        return Groups(n, m, VECTOR if found[1] else 1)
    raise ValueError(f"there is no pattern {text!r}; there are {SPELLINGS}")


def _cover(grid: tuple[int, int, int], random: np.random.Generator) -> npt.NDArray[np.intp]:
    """Return max(B, D) random units that leave no block row and no block column empty."""
    count = max(grid[:2])
    rows, cols = (np.resize(random.permutation(length), count) for length in grid[:2])
    return np.ravel_multi_index((rows, cols, random.integers(grid[2], size=count)), grid)


def _chunks(length: int, step: int) -> npt.NDArray[np.intp]:
    """Return the lengths of the pieces of `length` cut every `step`."""
    return np.minimum(length - np.arange(0, length, step), step)

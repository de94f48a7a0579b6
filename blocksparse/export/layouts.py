"""Which layout a weight is stored in: dense, BSR or packed N:M.

Legend: K out-channels, C in-channels, P kernel positions, r c block rows and columns, n of m.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

import numpy as np
import numpy.typing as npt

from blocksparse.format import BsrWeight, DenseWeight, NMWeight, Weight
from blocksparse.format.weights import MAX_GROUP, index_bits
from blocksparse.sparsity.patterns import Block, Pattern, VectorNM

SLACK = 1.1
"""A layout up to this factor above the smallest is taken where it is faster to run: more output
channels share an input, and dense needs no indices at all. So sparse layouts save at least 9 %."""

_SIDES = (1, 2, 4, 8, 16, 32)
_GROUPS = (2, 4, 8, 16)
# Rows of the runtime's register tile: sharing an input among more output channels gains no speed.
_TILE_ROWS = 8


@dataclass(frozen=True)
class Candidate:
    """A layout that can hold a weight exactly.

    Attributes
    ----------
    block : (int, int) or None
        ``(r, c)`` of a BSR layout.
    group : (int, int) or None
        ``(n, m)`` of an N:M layout.
    bytes : int
        Values and indices.
    share : float
        Fraction of blocks, or of each group, that is stored, 0..1.
    """

    bytes: int
    share: float = 1.0
    block: tuple[int, int] | None = None
    group: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """``"dense"``, ``"bsr 8x8"`` or ``"nm 2:4"``."""
        if self.block is not None:
            return f"bsr {self.block[0]}x{self.block[1]}"
        return "dense" if self.group is None else f"nm {self.group[0]}:{self.group[1]}"

    @property
    def rows(self) -> int:
        """Output channels that share an input when it runs."""
        if self.block is not None:
            return min(self.block[0], _TILE_ROWS)
        return _TILE_ROWS + 1 if self.group is None else 1

    def build(self, weight: npt.NDArray[np.float32]) -> Weight:
        """Store `weight` in this layout."""
        if self.block is not None:
            return BsrWeight.from_dense(weight, self.block)
        if self.group is not None:
            return NMWeight.from_dense(weight, *self.group)
        return DenseWeight.from_dense(weight)


def choose(
    weight: npt.NDArray[np.float32],
    groups: int = 1,
    pattern: Pattern | None = None,
    block: tuple[int, int] | None = None,
) -> tuple[Candidate, str]:
    """Choose the layout of one weight.

    Candidates are dense, and: BSR of the given `block`; else what `pattern` calls for, as long as
    the weight obeys it (``Block(r, c)`` and ``Unstructured`` BSR r x c and 1x1, ``NM`` packed N:M
    in groups of at most 256, ``VectorNM(v, n, m)`` BSR v x 1, since v output channels share each
    input); else every BSR shape of powers of two up to 32 and every N:M that the zeros of the
    weight allow. The smallest in bytes wins; within `SLACK` of it, the one whose rows share more
    inputs.

    Parameters
    ----------
    weight : ndarray of float32
        ``[K, C/groups, kh, kw]`` or ``[O, F]``.
    groups : int
        Of the convolution; more than one is stored densely.
    pattern : Pattern, optional
        What the weight was pruned to.
    block : (int, int), optional
        Block shape the user asks for.

    Returns
    -------
    Candidate
    str
        The reason, one short line.
    """
    dense = Candidate(bytes=4 * weight.size)
    if groups > 1:
        return dense, f"dense: convolution in {groups} groups"
    used = _matrix(weight) != 0
    nonzero = int(np.count_nonzero(used))
    # Every layout stores at least the nonzeros.
    if nonzero == weight.size:
        return dense, "dense: no zeros"
    if nonzero * 4 * SLACK > dense.bytes:
        return dense, f"dense: only {1 - nonzero / weight.size:.1%} of it is zero"
    sparse = list(_candidates(used, pattern, block))
    found = [dense, *sparse]
    smallest = min(candidate.bytes for candidate in found)
    best = min(
        (candidate for candidate in found if candidate.bytes <= SLACK * smallest),
        key=lambda candidate: (-candidate.rows, candidate.bytes),
    )
    ratio = best.bytes / dense.bytes
    if best.block is not None:
        return best, f"{best.label}: {best.share:.1%} of blocks, {ratio:.2f} of dense bytes"
    if best.group is not None:
        n, m = best.group
        return best, f"{best.label}: {n} of every {m} channels, {ratio:.2f} of dense bytes"
    rival = min(sparse, key=lambda candidate: candidate.bytes)
    return dense, (
        f"dense: {1 - nonzero / weight.size:.1%} of it is zero, but {rival.label} takes "
        f"{rival.bytes / dense.bytes:.2f} of dense bytes"
    )


def _candidates(
    used: npt.NDArray[np.bool_], pattern: Pattern | None, block: tuple[int, int] | None
) -> Iterator[Candidate]:
    if block is None and isinstance(pattern, Block):
        block = (pattern.rows, pattern.cols)
    if block is None and isinstance(pattern, VectorNM):
        if pattern.vector > 1:
            block = (pattern.vector, 1)
        # The file has no index for a larger group: the zeros say which layout is best then.
        elif pattern.m <= MAX_GROUP and _fullest_group(used, pattern.m) <= pattern.n:
            yield _grouped(used, pattern.n, pattern.m)
            return
    if block is not None:
        yield _blocked(used, *block, _count_blocks(used, *block))
        return
    rows = used
    for r in _SIDES:
        rows = _join(rows, 2, axis=0) if r > 1 else rows
        blocks = rows
        for c in _SIDES:
            blocks = _join(blocks, 2, axis=2) if c > 1 else blocks
            yield _blocked(used, r, c, int(np.count_nonzero(blocks)))
    for m in _GROUPS:
        n = _fullest_group(used, m)
        if 0 < n < m:
            yield _grouped(used, n, m)


def _matrix(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the weight as ``[K, P, C]``."""
    k, c = weight.shape[:2]
    return weight.reshape(k, c, prod(weight.shape[2:])).transpose(0, 2, 1)


def _blocked(used: npt.NDArray[np.bool_], r: int, c: int, stored: int) -> Candidate:
    k, positions, channels = used.shape
    rows = ceil(k / r)
    size = stored * (4 * r * c + 4) + 4 * (rows + 1)
    total = rows * positions * ceil(channels / c)
    return Candidate(bytes=size, share=stored / total, block=(r, c))


def _grouped(used: npt.NDArray[np.bool_], n: int, m: int) -> Candidate:
    k, positions, channels = used.shape
    stored = positions * ceil(channels / m) * n
    size = k * (4 * stored + ceil(stored * index_bits(m) / 8))
    return Candidate(bytes=size, share=n / m, group=(n, m))


def _count_blocks(used: npt.NDArray[np.bool_], r: int, c: int) -> int:
    return int(np.count_nonzero(_join(_join(used, r, axis=0), c, axis=2)))


def _fullest_group(used: npt.NDArray[np.bool_], m: int) -> int:
    starts = np.arange(0, used.shape[2], m)
    return int(np.add.reduceat(used, starts, axis=2, dtype=np.int32).max())


def _join(blocks: npt.NDArray[np.bool_], count: int, axis: int) -> npt.NDArray[np.bool_]:
    """Join `count` neighbours along one axis: True where one of them is; the last may be fewer."""
    if missing := -blocks.shape[axis] % count:
        blocks = np.pad(blocks, [(0, missing if i == axis else 0) for i in range(blocks.ndim)])
    # An axis of its own to reduce takes an eighth of the time of `np.logical_or.reduceat`.
    before, after = blocks.shape[:axis], blocks.shape[axis + 1 :]
    apart = blocks.reshape(*before, -1, count, *after)
    return np.asarray(apart.any(axis=axis + 1))

"""Patterns: which weights may be zero together.

A pattern cuts a weight into *units*. A unit is the smallest thing that pruning decides about: a
block that is dropped whole, or an N:M group that is made to obey. Which units go is decided
elsewhere (`selection`); a pattern only says what they are, what each one is worth, and how a choice
of units becomes a mask.
"""

# Shape letters:
#   K output channels (O of a linear layer)   C input channels (I of a linear layer)
#   T taps: product of the kernel sizes, 1 for a linear layer
#   B D block rows and block columns, the ragged last ones included; P positions: T, or 1 if shared
#   V vectors of output channels   G groups of input channels
#   U units, in the row-major order each pattern states

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from blocksparse.sparsity.scores import Score

_TOGETHER = 2**18
"""Weights whose terms are in memory at a time: they are float64, 0.8 GB of a layer of VGG-16."""


@dataclass(frozen=True)
class Units:
    """The units of one weight.

    Parameters
    ----------
    importance : Tensor
        float32 [U], what is lost per weight when the unit is dropped. 0 if nothing is.
    size : Tensor
        int64 [U], how many weights become zero when the unit is dropped.
    mask : callable
        Takes bool [U], True where the unit is kept, and returns the mask: bool, the shape of the
        weight, True where the weight is kept.
    """

    importance: Tensor
    size: Tensor
    mask: Callable[[Tensor], Tensor]


class Pattern(ABC):
    """What may be zero together, in convolution weights [K, C, ...] and linear weights [O, I]."""

    @property
    @abstractmethod
    def limit(self) -> float:
        """The sparsity of a weight without ragged edges when every unit is dropped."""

    @abstractmethod
    def sizes(self, shape: tuple[int, ...]) -> Tensor:
        """Return int64 [U], the weights that become zero when each unit is dropped."""

    @abstractmethod
    def units(self, weight: Tensor, score: Score) -> Units:
        """Cut ``weight`` into units and say what each is worth."""

    @abstractmethod
    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
        """Return (B, D, P), the axes of the units: block rows, block columns, positions.

        None if the pattern cannot empty a channel, so that there is nothing to protect.
        """

    @abstractmethod
    def together(self, shape: tuple[int, ...]) -> Tensor:
        """Return int64 [C * T], alike for the inputs of one output that are zero together."""


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of ``rows`` output by ``cols`` input channels, kept or dropped whole.

    Parameters
    ----------
    rows, cols : int
        Size of a block. Where the channels do not divide, the last block is smaller.
    shared : bool
        True: one choice for all kernel positions, so that a block is rows x cols x taps, as in the
        Weight Block Sparsity paper (arXiv 2407.09453). False: one choice per kernel position.

    Notes
    -----
    Units are ordered [B, D] if shared, else [B, D, T].
    """

    rows: int = 8
    cols: int = 8
    shared: bool = True

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(
                f"a block needs at least 1 row and 1 column, not {self.rows}x{self.cols}"
            )

    def __str__(self) -> str:
        return f"block {self.rows}x{self.cols} {'shared' if self.shared else 'per position'}"

    @property
    def limit(self) -> float:
        """Every block can go: 1.0."""
        return 1.0

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return block rows, block columns, and 1 position if shared, else the taps."""
        outs, ins, taps = _folded(shape)
        return _ceil(outs, self.rows), _ceil(ins, self.cols), 1 if self.shared else taps

    def together(self, shape: tuple[int, ...]) -> Tensor:
        """Return int64 [C * T], the number of the block that each input lies in."""
        _, ins, taps = _folded(shape)
        _, _, positions = self.grid(shape)
        cols = torch.arange(ins) // self.cols
        return (cols[:, None] * positions + torch.arange(taps) % positions).reshape(-1)

    def sizes(self, shape: tuple[int, ...]) -> Tensor:
        """Return int64 [U], the real weights of each block."""
        outs, ins, taps = _folded(shape)
        block_rows, block_cols, positions = self.grid(shape)
        height = _chunks(outs, self.rows)
        width = _chunks(ins, self.cols)
        per_block = height[:, None] * width[None, :] * (taps if self.shared else 1)
        return per_block[:, :, None].expand(block_rows, block_cols, positions).reshape(-1)

    def units(self, weight: Tensor, score: Score) -> Units:
        """Cut ``weight`` into blocks."""
        shape = tuple(weight.shape)
        outs, ins, taps = _folded(shape)
        block_rows, block_cols, positions = self.grid(shape)
        together = self.rows * max(1, _TOGETHER // (self.rows * ins * taps))
        parts = weight.split(together)
        total = torch.cat([self._sums(score.terms(p).reshape(-1, ins, taps)) for p in parts])
        size = self.sizes(shape).to(total.device)

        def mask(keep: Tensor) -> Tensor:
            blocks = keep.reshape(block_rows, block_cols, positions)
            rows = blocks.repeat_interleave(self.rows, 0)[:outs]
            full = rows.repeat_interleave(self.cols, 1)[:, :ins]
            return full.expand(outs, ins, taps).reshape(shape)

        return Units(score.root(total, size), size, mask)

    def _sums(self, terms: Tensor) -> Tensor:
        """Add up the terms of each block, [K, C, T] to [U]."""
        outs, ins, taps = terms.shape
        block_rows, block_cols, _ = self.grid((outs, ins, taps))
        # Padding adds zeros to the sums and nothing to the sizes.
        pad = (0, 0, 0, block_cols * self.cols - ins, 0, block_rows * self.rows - outs)
        if any(pad):  # else it would only copy
            terms = torch.nn.functional.pad(terms, pad)
        tiles = terms.reshape(block_rows, self.rows, block_cols, self.cols, taps)
        return tiles.sum((1, 3, 4) if self.shared else (1, 3)).reshape(-1)


@dataclass(frozen=True)
class Unstructured(Block):
    """Every weight for itself: blocks of 1x1 at one kernel position."""

    rows: int = 1
    cols: int = 1
    shared: bool = False

    def __post_init__(self) -> None:
        if (self.rows, self.cols, self.shared) != (1, 1, False):
            raise ValueError("Unstructured takes no parameters; use Block for blocks")

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class VectorNM(Pattern):
    """At most ``n`` of every ``m`` consecutive input channels, alike in ``vector`` output channels.

    At one kernel position, ``m`` consecutive input channels by ``vector`` consecutive output
    channels form a group. A group that obeys keeps the ``n`` input channels that score highest over
    its output channels; a group that does not obey yet keeps all. The last group along the input
    channels may have fewer than ``m``; it too keeps at most ``n``.

    Parameters
    ----------
    vector : int
        Output channels that share one choice. 1 is plain N:M.
    n, m : int
        At most ``n`` of ``m`` are nonzero; 1 <= n < m.

    Notes
    -----
    Units are the groups, ordered [V, T, G]. Sparsity between 0 and 1 - n/m is reached by letting
    only a share of the groups obey, those that lose least first.
    """

    vector: int = 8
    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"N:M needs 1 <= n < m, not {self.n}:{self.m}")
        if self.vector < 1:
            raise ValueError(f"VectorNM needs at least 1 output channel, not {self.vector}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m} x {self.vector} outputs"

    @property
    def limit(self) -> float:
        """The sparsity when every group obeys: 1 - n/m."""
        return 1.0 - self.n / self.m

    def grid(self, shape: tuple[int, ...]) -> None:
        """Return None: each group keeps n of its channels at every output channel."""
        return

    def together(self, shape: tuple[int, ...]) -> Tensor:
        """Return int64 [C * T], all different: a group loses each of its inputs by itself."""
        _, ins, taps = _folded(shape)
        return torch.arange(ins * taps)

    def sizes(self, shape: tuple[int, ...]) -> Tensor:
        """Return int64 [U], the weights that a group loses when it obeys."""
        outs, ins, taps = _folded(shape)
        height = _chunks(outs, self.vector)
        width = (_chunks(ins, self.m) - self.n).clamp(min=0)
        per_group = height[:, None] * width[None, :]
        return per_group[:, None, :].expand(len(height), taps, len(width)).reshape(-1)

    def units(self, weight: Tensor, score: Score) -> Units:
        """Cut ``weight`` into groups."""
        shape = tuple(weight.shape)
        outs, ins, taps = _folded(shape)
        vectors, groups = _ceil(outs, self.vector), _ceil(ins, self.m)
        terms = score.terms(weight).reshape(outs, ins, taps).permute(0, 2, 1)
        size = self.sizes(shape).to(terms.device)
        pad = (0, groups * self.m - ins, 0, 0, 0, vectors * self.vector - outs)
        tiles = torch.nn.functional.pad(terms, pad)
        column = tiles.reshape(vectors, self.vector, taps, groups, self.m).sum(1)
        # Rounded before it is ranked, for the reason `scores` gives. Channels that are only padding
        # are the last of their group, so that a stable sort leaves them behind every real one.
        rank = column.to(torch.float32)
        order = rank.sort(dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros_like(rank, dtype=torch.bool)
        chosen.scatter_(-1, order[..., : self.n], True)
        lost = column.masked_fill(chosen, 0.0).sum(-1).reshape(-1)

        def mask(keep: Tensor) -> Tensor:
            full = chosen | keep.reshape(vectors, taps, groups, 1)
            channels = full.reshape(vectors, taps, groups * self.m)[..., :ins]
            rows = channels.repeat_interleave(self.vector, 0)[:outs]
            return rows.permute(0, 2, 1).reshape(shape)

        return Units(score.root(lost, size.clamp(min=1)), size, mask)


@dataclass(frozen=True, init=False)
class NM(VectorNM):
    """At most ``n`` of every ``m`` consecutive input channels are nonzero.

    Per output channel and kernel position, along the input channels of a convolution weight
    [K, C, ...] as of a linear weight [O, I]. 2:4 is what others call 2:4 semi-structured sparsity.
    """

    vector: int = 1
    n: int = 2
    m: int = 4

    def __init__(self, n: int = 2, m: int = 4) -> None:
        object.__setattr__(self, "vector", 1)
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)
        self.__post_init__()

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


_KINDS: dict[str, type[Pattern]] = {
    "block": Block,
    "unstructured": Unstructured,
    "vector_nm": VectorNM,
    "nm": NM,
}


def pattern_to_json(pattern: Pattern) -> dict[str, Any]:
    """Return ``pattern`` as a dict of plain values, e.g. ``{"kind": "nm", "n": 2, "m": 4}``."""
    kind = next(name for name, cls in _KINDS.items() if type(pattern) is cls)
    if isinstance(pattern, Unstructured):
        return {"kind": kind}
    entries = {field.name: getattr(pattern, field.name) for field in fields(pattern)}  # type: ignore[arg-type]
    if isinstance(pattern, NM):
        del entries["vector"]
    return {"kind": kind, **entries}


def pattern_from_json(entry: Mapping[str, Any]) -> Pattern:
    """Return the pattern that `pattern_to_json` wrote.

    Raises
    ------
    ValueError
        If ``entry`` names no known kind of pattern.
    """
    entries = dict(entry)
    kind = entries.pop("kind", None)
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise ValueError(f"unknown kind of pattern {kind!r}: known are {known}")
    return _KINDS[kind](**entries)


def _folded(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (K, C, T) of a weight shape."""
    if len(shape) < 2:
        raise ValueError(f"a weight of shape {shape} has no input and output channels")
    return shape[0], shape[1], math.prod(shape[2:])


def _ceil(length: int, step: int) -> int:
    return -(-length // step)


def _chunks(length: int, step: int) -> Tensor:
    """Return int64: the lengths of the pieces of ``length`` cut every ``step``."""
    starts = torch.arange(0, length, step)
    return (length - starts).clamp(max=step)

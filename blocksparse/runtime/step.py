"""What a network is computed by: its steps, and the values that they read and write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from blocksparse.format import Node

from . import layout
from .kernels import records
from .kernels.records import Layout
from .prepack import Packed


@dataclass(frozen=True)
class Rows:
    """Which rows half a step computes, see `halves`.

    Parameters
    ----------
    half : int
        0 for the upper half, 1 for the lower, which runs at the same time as the step before.
    start, height : int
        First row of its output, of the whole value, and how many.
    top : int
        Rows of padding above what it reads; below zero, rows of that it does not need.
    above, below : int
        Rows it reads beyond its own half of the input.
    """

    half: int
    start: int
    height: int
    top: int = 0
    above: int = 0
    below: int = 0

    def extended(self, where: Layout) -> Layout:
        """Take the rows of the other half, which lie around a half, into its layout."""
        base, height = where.base - self.above * where.row, where.height + self.above + self.below
        return where._replace(base=base, height=height)

    def borders(self, source: Layout, target: Layout) -> dict[int, Layout]:
        """Lay out the rows at the border of the other half, and where this half keeps them.

        Returns
        -------
        dict of int to Layout
            By their place in a record.
        """
        first = (source.height - self.height, -self.height) if self.half else (0, target.height)
        places = (records.SOURCE, records.TARGET)
        return {
            at: where._replace(base=where.base + row * where.row, height=self.height, margin=-1)
            for at, where, row in zip(places, (source, target), first, strict=True)
        }


@dataclass(frozen=True, eq=False)
class Step:
    """One step of the network.

    Parameters
    ----------
    op : int
        A step kind of `kernels.records`.
    node : Node
        The node it belongs to.
    source, target : str
        Names of the values read and written.
    other : str or None
        Second operand, or the residual.
    packed : Packed or None
        Prepared weight of a product.
    details : dict
        What else the step needs, by kind.
    rows : Rows or None
        Which half this is of a step that is cut in two.
    joins : Rows or None
        How a copy or pool that is not, but reads halves, reads the lower one, its `other`; `rows`
        then says how it reads the upper.
    """

    op: int
    node: Node
    source: str
    target: str
    other: str | None = None
    packed: Packed | None = None
    details: dict[str, Any] = field(default_factory=dict)
    rows: Rows | None = None
    joins: Rows | None = None

    @property
    def joined(self) -> bool:
        """Whether the next step, the lower half, runs at the same time."""
        return self.rows is not None and self.rows.half == 0 and self.joins is None

    @property
    def top(self) -> int:
        """Rows of padding above the input of a convolution or pool."""
        if self.rows is not None:
            return self.rows.top
        return 0 if layout.is_phases(self.source, self.node) else int(self.node.attrs["padding"][0])

    @property
    def owner(self) -> str:
        """Node whose time this is when ways to compute a network are compared.

        A pool that tiles of the convolution before it could take in counts to that one, so that
        its time is the same work whichever way it went.
        """
        return str(self.details.get("pool_of", self.node.name))


@dataclass(frozen=True)
class Place:
    """Where a value lives: channels of a memory block, named by the value that owns it."""

    owner: str
    channel: int = 0


@dataclass(frozen=True, eq=False)
class Steps:
    """A network as steps.

    Parameters
    ----------
    steps : list of Step
        In order.
    shapes : dict
        Shape (C, H, W) or (F,) of every value, phase planes included.
    frames : dict
        Frame of every feature map.
    places : dict
        Place of every value.
    input, output : str
        Names of the values that come in and go out.
    halves : dict
        Which half of a value a value is: 0 the upper, 1 the lower.
    origins : list of int
        Where these are a piece of a network, or steps were cut in halves: the number of the step of
        the whole network that each belongs to.
    """

    steps: list[Step]
    shapes: dict[str, tuple[int, ...]]
    frames: dict[str, layout.Frame]
    places: dict[str, Place]
    input: str
    output: str
    halves: dict[str, int] = field(default_factory=dict)
    origins: list[int] = field(default_factory=list)

"""A network in two pieces: the layers that make feature maps, and the linear ones behind them.

A batch goes through the first in parts, see `batches`, through the second together. What a linear
layer takes is the time its weights take to come from memory, so all images should wait for them
once: VGG-16's are 494 MB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from .kernels import records
from .step import Step, Steps


class Piece(Enum):
    """What part of a network a plan is for."""

    ALL = "the whole network"
    BACKBONE = "all that comes before the head"
    HEAD = "linear layers at the end"


@dataclass(frozen=True, eq=False)
class Pieces:
    """A network as steps, whole and cut in two.

    Parameters
    ----------
    steps : dict of Piece to Steps
        `Piece.ALL` only, if the network does not end in linear layers. The other two know which
        step of the whole network each of theirs is.
    """

    steps: dict[Piece, Steps]

    @property
    def has_head(self) -> bool:
        """Whether the network can be cut."""
        return Piece.HEAD in self.steps


def cut(whole: Steps) -> Pieces:
    """Cut a network before its last linear layers, with what lies between them.

    Parameters
    ----------
    whole : Steps
        As `steps.lower` returns it.
    """
    at = _seam(whole)
    if at is None:
        return Pieces({Piece.ALL: whole})
    (value,) = _read(whole, at)
    before, after = whole.steps[:at], whole.steps[at:]
    store = Step(records.STORE, before[-1].node, value, value, details=_PLAIN)
    load = Step(records.LOAD, after[0].node, value, value, details=_PLAIN)
    return Pieces(
        {
            Piece.ALL: whole,
            Piece.BACKBONE: replace(
                whole, steps=[*before, store], origins=[*range(at), at - 1], output=value
            ),
            Piece.HEAD: replace(
                whole, steps=[load, *after], origins=[at, *range(at, len(whole.steps))], input=value
            ),
        }
    )


_PLAIN = {"scale": (1, 1, 1), "shift": (0, 0, 0)}


def _seam(whole: Steps) -> int | None:
    """Find the first step of the head."""
    first = len(whole.steps)
    while first > 1 and all(
        len(whole.shapes[name]) == 1 for name in _values(whole.steps[first - 1])
    ):
        first -= 1
    linear = (records.LINEAR, records.LINEAR_NM)
    for at in range(first, len(whole.steps)):
        if not any(step.op in linear for step in whole.steps[at:]):
            return None
        if len(_read(whole, at)) == 1:
            return at
    return None


def _read(whole: Steps, at: int) -> set[str]:
    """Names of the values that steps from here on read, and none of them writes."""
    behind = whole.steps[at:]
    names = {name for step in behind for name in (step.source, step.other) if name is not None}
    return names - {step.target for step in behind if step.op != records.STORE}


def _values(step: Step) -> list[str]:
    return [name for name in (step.source, step.target, step.other) if name is not None]

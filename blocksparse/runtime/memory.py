"""One block of memory for all values; a place is free again once its value was last read.

What a layer adds to its sums, or an element-wise operation reads, is overwritten with the result
where nobody needs it any more: its lines are in cache, and one stream of memory less is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import layout
from .kernels import records
from .step import Place, Step, Steps

_ADDS = {
    *(records.CONV, records.CONV_NM, records.WINOGRAD, records.LINES_CONV, records.TILES_CONV),
    records.ELEMENTWISE,
}
"""Steps that read a second operand, if they have one, pixel by pixel, but for gates: each just
before that pixel is written."""


@dataclass(frozen=True)
class Lifetime:
    """When a value exists, in steps, both ends included."""

    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        """Whether both exist at some step."""
        return self.first <= other.last and other.first <= self.last


def assign(
    sizes: Mapping[str, int], lifetimes: Mapping[str, Lifetime], start: int = 0,
    placed: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[dict[str, int], int]:  # fmt: skip
    """Give every value a place so that no two that exist together overlap.

    Largest values first, each into the lowest gap that is free for its whole life: the
    greedy-by-size rule of Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
    Inference" (2020).

    Parameters
    ----------
    sizes : mapping of str to int
        Floats per value.
    lifetimes : mapping of str to Lifetime
        Same keys, and those of `placed`.
    start : int
        Lowest place.
    placed : mapping of str to tuple of int, optional
        Where values that have a place already begin and end.

    Returns
    -------
    places : dict of str to int
        First float of every value.
    total : int
        Where the last of them ends, at least `start`.
    """
    places: dict[str, int] = {}
    ranges = dict(placed or {})
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        taken = sorted(
            place for other, place in ranges.items() if lifetimes[name].overlaps(lifetimes[other])
        )
        at = start
        for first, end in taken:
            if at + sizes[name] <= first:
                break
            at = max(at, end)
        places[name] = at
        ranges[name] = at, at + sizes[name]
    return places, max((ranges[name][1] for name in places), default=start)


def place_values(steps: Steps, batch: int) -> tuple[dict[str, int], int]:
    """Give every value of a network a place, those of a half beside each other.

    Parameters
    ----------
    steps : Steps
        The network; where one thread writes one half of a value, and another the other, halves lie
        apart.
    batch : int
        Images.

    Returns
    -------
    places : dict of str to int
        First float of every value that owns its place.
    floats : int
        Where the last of them ends.
    """
    moments = _moments(steps)
    lives = _lifetimes(steps, moments)
    roots = _overwritten(steps, moments, lives)
    for name, root in roots.items():
        lives[root] = Lifetime(lives[root].first, lives[name].last)
    bases: dict[str, int] = {}
    ranges: dict[str, tuple[int, int]] = {}
    floats = 0
    for half in (0, 1, None):
        sizes = {
            name: layout.size(steps.shapes[name], steps.frames.get(name), batch)
            for name in lives.keys() - roots.keys()
            if steps.halves.get(name) == half
        }
        # what is whole lies where halves have just been: other places are in no near cache
        start = floats if half is not None else 0
        places, end = assign(sizes, lives, start, ranges)
        bases |= places
        ranges |= {name: (place, place + sizes[name]) for name, place in places.items()}
        floats = max(floats, layout.round_up(end, layout.ALIGN))
    return bases | {name: bases[root] for name, root in roots.items()}, floats


def _lifetimes(steps: Steps, moments: list[int]) -> dict[str, Lifetime]:
    """When the owners of places exist."""
    lives: dict[str, Lifetime] = {}
    for step, moment in zip(steps.steps, moments, strict=True):
        values = (step.source, step.target, step.other)
        for owner in {steps.places[name].owner for name in values if name is not None}:
            first = lives[owner].first if owner in lives else moment
            lives[owner] = Lifetime(first, moment)
    return lives


def _moments(steps: Steps) -> list[int]:
    """When each step runs: both halves of one at the same moment."""
    moments, moment = [], 0
    for step in steps.steps:
        moments.append(moment)
        moment += not step.joined
    return moments


def _overwritten(steps: Steps, moments: list[int], lives: Mapping[str, Lifetime]) -> dict[str, str]:
    """Values that take the place of one that their step reads last, and whose it was at first."""
    roots: dict[str, str] = {}
    for step, moment in zip(steps.steps, moments, strict=True):
        target = step.target
        for name in _read_by_pixel(steps, step):
            alike = (
                steps.places[name] == Place(name)
                and steps.places[target] == Place(target)
                and steps.shapes[name] == steps.shapes[target]
                and steps.frames.get(name) == steps.frames.get(target)
            )
            if alike and name != target and lives[name].last == moment:
                roots[target] = roots.get(name, name)
                break
    return roots


def _read_by_pixel(steps: Steps, step: Step) -> list[str]:
    """Values of which a step reads a pixel just before it writes the same pixel of its target."""
    if step.op not in _ADDS:
        return []
    added = [] if step.other is None else [step.other]
    if step.op == records.ELEMENTWISE:
        # one gate serves all pixels of a channel, those of another half, too
        return [*([] if step.details["function"] == "gate" else added), step.source]
    # the window of a convolution may read what is added, or a part of it: a concatenation's
    window = steps.places[step.source].owner
    return [name for name in added if steps.places[name].owner != window]

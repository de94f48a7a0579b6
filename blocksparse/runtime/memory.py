"""One block of memory for all values; a place is free again once its value was last read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
        for start, end in taken:
            if at + sizes[name] <= start:
                break
            at = max(at, end)
        places[name] = at
        ranges[name] = at, at + sizes[name]
    return places, max((ranges[name][1] for name in places), default=start)

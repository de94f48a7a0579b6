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
    sizes: Mapping[str, int], lifetimes: Mapping[str, Lifetime]
) -> tuple[dict[str, int], int]:
    """Give every value a place so that no two that exist together overlap.

    Largest values first, each into the lowest gap that is free for its whole life: the
    greedy-by-size rule of Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
    Inference" (2020).

    Parameters
    ----------
    sizes : mapping of str to int
        Floats per value.
    lifetimes : mapping of str to Lifetime
        Same keys.

    Returns
    -------
    places : dict of str to int
        First float of every value.
    total : int
        Floats needed for all.
    """
    places: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        taken = sorted(
            (places[other], places[other] + sizes[other])
            for other in places
            if lifetimes[name].overlaps(lifetimes[other])
        )
        at = 0
        for start, end in taken:
            if at + sizes[name] <= start:
                break
            at = max(at, end)
        places[name] = at
    total = max((places[name] + sizes[name] for name in places), default=0)
    return places, total

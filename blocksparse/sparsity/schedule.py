"""Schedules: how far the ramp from initial to final sparsity has come.

A schedule maps the progress of training, 0 at the start and 1 at the end, to the share of the ramp
that is done, 0 to 1. The sparsity at that moment is ``initial + (final - initial) * share``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule(ABC):
    """A ramp between two moments of training.

    Parameters
    ----------
    start, end : float
        Fractions of training, 0 <= start <= end <= 1. Before ``start`` the initial sparsity holds,
        from ``end`` on the final one.
    """

    start: float = 0.0
    end: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(
                f"a schedule needs 0 <= start <= end <= 1 (fractions of training), "
                f"not start={self.start}, end={self.end}"
            )

    def at(self, progress: float) -> float:
        """Return the share of the ramp that is done at ``progress``, both in 0..1.

        Examples
        --------
        >>> Linear(0.0, 0.5).at(0.25)
        0.5
        >>> Cubic(0.0, 0.5).at(0.25)
        0.875
        """
        if progress >= self.end:
            return 1.0
        if progress <= self.start:
            return 0.0
        return self._curve((progress - self.start) / (self.end - self.start))

    @abstractmethod
    def _curve(self, share: float) -> float:
        """Return how much is done after ``share`` of the ramp's time, both in 0..1."""


@dataclass(frozen=True)
class Cubic(Schedule):
    """Fast at first, while there is much to spare: ``1 - (1 - t)^3`` (arXiv 1710.01878)."""

    def _curve(self, share: float) -> float:
        return 1.0 - (1.0 - share) ** 3


@dataclass(frozen=True)
class Linear(Schedule):
    """The same amount at every update."""

    def _curve(self, share: float) -> float:
        return share


@dataclass(frozen=True)
class Steps(Schedule):
    """The same amount ``count`` times, with equal times between: the first one after ``start``.

    Parameters
    ----------
    start, end : float
        As in `Schedule`; the last step is at ``end``.
    count : int
        How many steps, at least 1.

    Examples
    --------
    >>> ramp = Steps(0.0, 0.5, count=2)
    >>> ramp.at(0.24), ramp.at(0.25), ramp.at(0.5)
    (0.0, 0.5, 1.0)
    """

    count: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise ValueError(f"a schedule in steps needs a count of at least 1, not {self.count}")

    def _curve(self, share: float) -> float:
        # Rounded, as 0.3 * 10 may come out below 3.
        return math.floor(round(share * self.count, 9)) / self.count


@dataclass(frozen=True, init=False)
class OneShot(Schedule):
    """Everything at once.

    Parameters
    ----------
    start : float
        Fraction of training at which the final sparsity is imposed; 0 prunes before the first step.
    """

    start: float = 0.0
    end: float = 0.0

    def __init__(self, start: float = 0.0) -> None:
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "end", start)
        self.__post_init__()

    def _curve(self, share: float) -> float:
        return 1.0

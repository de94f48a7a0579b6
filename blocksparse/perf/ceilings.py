"""The ceilings of a machine: multiply-adds per second, and bytes per second of each cache.

A kernel can be held back by arithmetic or by reading, so both are measured, as in the paper "Cache
Boundness of ML Operators on ARM" (2102.00932): multiply-adds that never leave the registers, for
each precision, and plain reading of a working set that no nearer cache can hold.
`blocksparse.perf.measure` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from blocksparse.runtime.caches import Cache

MEMORY = "memory"
"""The level behind the last cache."""


@dataclass(frozen=True)
class Ceiling:
    """The most that was reached of one thing.

    Attributes
    ----------
    name : str
        A precision (``f32``, ``bf16``, ``int8``) or a place to read from (``L1``, ..., ``memory``).
    unit : str
        ``GFLOP/s``, ``GOP/s`` or ``GB/s``: 10^9 operations or bytes per second.
    one : float
        Best run of one thread.
    all : float or None
        Best run of one thread on each core, added up. None for a cache of which all cores together
        have too little to tell it from nearer ones.
    median_one, median_all : float
        Median run; None with `all`.
    bytes_one, bytes_all : int
        Working set of one thread alone, and of each thread among all; 0 for arithmetic.
    """

    name: str
    unit: str
    one: float
    all: float | None
    median_one: float
    median_all: float | None
    bytes_one: int = 0
    bytes_all: int = 0

    def at(self, threads: int, cores: int) -> float:
        """Return the ceiling for a number of threads, from what one and all of them reach.

        Between the two it rises with each thread until all of them reach no more together. Where
        all were not measured it goes on rising: no number of threads reaches more than that.
        """
        alone = min(threads, cores) * self.one
        if self.all is None:
            return alone
        if threads >= cores:
            return self.all
        return self.one if threads == 1 else min(alone, self.all)

    def or_better(self, earlier: Ceiling) -> Ceiling:
        """Return this, or what was reached before, reading the same bytes, where that is more."""
        found = self
        if (earlier.bytes_one, earlier.bytes_all) == (self.bytes_one, self.bytes_all):
            if earlier.one > self.one:
                found = replace(found, one=earlier.one, median_one=earlier.median_one)
            if self.all is not None and earlier.all is not None and earlier.all > self.all:
                found = replace(found, all=earlier.all, median_all=earlier.median_all)
        return found


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of a machine.

    Attributes
    ----------
    processor : str
        Name of the processor.
    cores : int
        Cores the process could use.
    caches : tuple of Cache
        Data caches by level.
    compute, reading : tuple of Ceiling
        Multiply-adds by precision, and reading by level, memory last. A cache is missing that one
        thread alone cannot tell from nearer ones.
    notes : tuple of str
        What was assumed, and what could not be told apart.
    """

    processor: str
    cores: int
    caches: tuple[Cache, ...]
    compute: tuple[Ceiling, ...]
    reading: tuple[Ceiling, ...]
    notes: tuple[str, ...] = ()

    def peak(self, precision: str, threads: int) -> float:
        """Return 10^9 operations per second, for a number of threads.

        Raises
        ------
        ValueError
            If the precision was not measured: the processor has no instruction for it.
        """
        return self._named(self.compute, precision).at(threads, self.cores)

    def bandwidth(self, level: str, threads: int) -> float:
        """Return 10^9 bytes per second read from a level, for a number of threads."""
        return self._named(self.reading, level).at(threads, self.cores)

    def level_of(self, count: int, threads: int) -> str:
        """Name the nearest level whose caches, within reach of the threads, hold so many bytes.

        For a level that was not measured the nearer one answers, so that a bound stays a bound.
        """
        measured = {row.name for row in self.reading}
        name = ""
        for cache in self.caches:
            # the first is always measured
            name = cache.name if cache.name in measured else name
            if count <= cache.within_reach(min(threads, self.cores)):
                return name
        return MEMORY

    def or_better(self, earlier: Ceilings) -> Ceilings:
        """Return these, with what an earlier measurement of the machine reached where that is more.

        What disturbs a measurement only makes it slower, so the better one is nearer the truth.
        """
        known = {row.name: row for row in (*earlier.compute, *earlier.reading)}

        def best(rows: tuple[Ceiling, ...]) -> tuple[Ceiling, ...]:
            return tuple(row.or_better(known.get(row.name, row)) for row in rows)

        return replace(self, compute=best(self.compute), reading=best(self.reading))

    @staticmethod
    def _named(ceilings: tuple[Ceiling, ...], name: str) -> Ceiling:
        for ceiling in ceilings:
            if ceiling.name == name:
                return ceiling
        known = ", ".join(ceiling.name for ceiling in ceilings)
        raise ValueError(f"no ceiling was measured for {name!r} on this machine, only for {known}")

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Ceilings:
        """Make the object of which `dataclasses.asdict` gave the dictionary."""
        return cls(
            processor=str(tree["processor"]),
            cores=int(tree["cores"]),
            caches=tuple(Cache(**row) for row in tree["caches"]),
            compute=tuple(Ceiling(**row) for row in tree["compute"]),
            reading=tuple(Ceiling(**row) for row in tree["reading"]),
            notes=tuple(tree["notes"]),
        )

"""The caches of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

KIB = 1024


@dataclass(frozen=True)
class Cache:
    """One level of data caches.

    Attributes
    ----------
    level : int
        1 is the nearest to the core.
    bytes : int
        Size of one cache of this level.
    cores : int
        How many of the cores this process may use share one.
    """

    level: int
    bytes: int
    cores: int

    @property
    def name(self) -> str:
        """``L1``, ``L2``, ..."""
        return f"L{self.level}"

    def within_reach(self, threads: int) -> int:
        """Bytes of all caches of this level that `threads` threads, spread over cores, have."""
        return self.bytes * -(-threads // self.cores)


def usual_caches(cores: int) -> tuple[Cache, ...]:
    """Return what to assume where the system does not tell: the sizes of a common processor."""
    return Cache(1, 32 * KIB, 1), Cache(2, KIB**2, 1), Cache(3, 32 * KIB**2, cores)


def system_caches(cpus: Iterable[int], root: Path | None = None) -> tuple[Cache, ...]:
    """Read the data caches from Linux, those of the first of the given processors.

    Parameters
    ----------
    cpus : iterable of int
        The processors this process may use.
    root : Path, optional
        Where Linux lists processors; ``/sys/devices/system/cpu`` by default.

    Returns
    -------
    tuple of Cache
        By level; empty where the system does not tell.
    """
    usable = set(cpus)
    folder = (root or Path("/sys/devices/system/cpu")) / f"cpu{min(usable)}" / "cache"
    found = {}
    for entry in sorted(folder.glob("index*")):
        try:
            kind, level, size, shared = (
                (entry / name).read_text(encoding="ascii").strip()
                for name in ("type", "level", "size", "shared_cpu_list")
            )
            if kind in {"Data", "Unified"}:
                sharing = len(usable & _listed(shared))
                found[int(level)] = Cache(int(level), _bytes(size), max(sharing, 1))
        except (OSError, ValueError):
            continue
    return tuple(found[level] for level in sorted(found))


@cache
def second_level() -> int:
    """Return the bytes of a core's second-level cache; 1 MiB where the system does not tell."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    known = system_caches(cpus) or usual_caches(len(cpus))
    return next((cache.bytes for cache in known if cache.level == 2), KIB**2)


def _listed(text: str) -> set[int]:
    """Processors of a list such as ``0-3,8``."""
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def _bytes(text: str) -> int:
    """Bytes of a size such as ``48K``."""
    scale = {"K": KIB, "M": KIB**2, "G": KIB**3}.get(text[-1:])
    return int(text[:-1]) * scale if scale else int(text)

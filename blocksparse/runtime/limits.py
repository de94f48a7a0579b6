"""What this process may use of the machine: cores and memory, the limits of containers included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cores() -> int:
    """Return how many cores this process may keep busy.

    Returns
    -------
    int
        Those of its affinity mask, or fewer where a container has a quota of processor time: 2 with
        2.5 cores' worth, since a thread that has to sit out its turn holds up all the others. At
        least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = min(_quotas(Path("/")), default=float(cores))
    return max(1, min(cores, int(quota)))


def memory_limit() -> int:
    """Return the bytes of memory of the machine, or of the container where that has fewer."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX
        machine = 4 * 2**30
    return min([machine, *_memory_limits(Path("/"))])


def _quotas(root: Path) -> Iterator[float]:
    """Yield the cores' worth of time that each control group around this process leaves it.

    ``cpu.max`` of version 2 is "QUOTA PERIOD" or "max PERIOD"; version 1 has a file for each, and
    -1 for no quota (cgroup-v2.rst and sched-bwc.rst of Linux' documentation).
    """
    for group in _groups(root):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if not period:
            quota, period = (_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _memory_limits(root: Path) -> Iterator[int]:
    """Yield the bytes that each control group around this process may have."""
    for group in _groups(root):
        for name in ("memory.max", "memory.limit_in_bytes"):  # version 2 and 1
            if (limit := _read(group / name)).isdigit():
                yield int(limit)


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups, each followed by those it is in.

    Version 1 has a tree of groups for each of some controllers, version 2 one, which names none.
    Controllers that share a tree may be named in another order than its folder names them, and then
    each has a link to it.
    In a container a group may be named as it is seen from outside. Then only the last folder, that
    of the controller itself, is there, and it is the container's own.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        parts = PurePosixPath(group).parts[1:]
        for name in dict.fromkeys([controllers, *controllers.split(",")]):
            for count in range(len(parts), -1, -1):
                yield (root / "sys/fs/cgroup" / name).joinpath(*parts[:count])


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:  # no Linux, or no such controller
        return ""

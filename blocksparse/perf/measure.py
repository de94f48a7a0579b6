"""Measure the ceilings of this machine, and keep them.

Nothing is taken from a data sheet; what counts is what this process gets here. All probes take
turns, in runs of about twenty milliseconds, and the best run of each counts: what disturbs a run
only makes it slower. The median is kept beside it, and tells how quiet the machine was.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import llvmlite
import numpy as np
import numpy.typing as npt

from blocksparse.perf import probes
from blocksparse.perf.ceilings import MEMORY, Ceiling, Ceilings
from blocksparse.perf.machine import describe_machine
from blocksparse.perf.timing import Timing, interleave
from blocksparse.runtime.caches import Cache, system_caches, usual_caches
from blocksparse.runtime.helpers import Helpers
from blocksparse.runtime.kernels.cache import cache_folder
from blocksparse.runtime.kernels.objects import compile_text
from blocksparse.runtime.kernels.target import Target, host
from blocksparse.runtime.limits import memory_limit, usable_cores
from blocksparse.whole_file import write_whole

ROUNDS = 9
RUN_SECONDS = 0.02
ATTEMPTS = 3
"""How often all is measured on a machine that is too busy to trust one series of runs."""

QUIET = 0.8
"""Least share of the best run that the median run reaches on a quiet machine."""

_VERSION = 3  # of what is kept on disk
_log = logging.getLogger(__name__)


def machine_ceilings(
    again: bool = False, on_share: Callable[[float], None] | None = None
) -> Ceilings:
    """Return the ceilings of this machine, measured once and then kept on disk.

    They lie beside the compiled kernels, in :func:`ceilings_file`, and are found again for the same
    processor, number of cores, caches, probes and compiler. A file that cannot be read is measured
    anew; a folder that cannot be written costs the next process the same few seconds.

    Parameters
    ----------
    again : bool
        Measure even where there is something kept. The better of both figures counts, for each
        probe: what runs meanwhile must not lower what was reached before. Only without the file
        all starts over.
    on_share : callable, optional
        Told the share of the work that is done, 0..1.
    """
    path = ceilings_file()
    kept = _read(path)
    if kept is not None and not again:
        return kept
    measured = measure(cores=usable_cores(), on_share=on_share)
    if kept is not None:
        measured = measured.or_better(kept)
    _keep(path, measured)
    return measured


def measure(
    rounds: int = ROUNDS,
    run_seconds: float = RUN_SECONDS,
    cores: int | None = None,
    memory_bytes: int | None = None,
    on_share: Callable[[float], None] | None = None,
) -> Ceilings:
    """Measure the ceilings of this machine; nothing is kept.

    Parameters
    ----------
    rounds : int
        Runs of each probe.
    run_seconds : float
        About how long one run takes. A run reads its working set at least once.
    cores : int, optional
        Threads of the runs on all cores; all the process may use by default.
    memory_bytes : int, optional
        Most bytes to read from memory; a quarter of the machine's by default.
    on_share : callable, optional
        Told the share of the work that is done, 0..1; starts over where the machine was too busy.
    """
    cores = cores or usable_cores()
    target = host()
    caches = _told_caches()
    notes = []
    if not caches:
        caches = usual_caches(cores)
        sizes = ", ".join(f"{cache.name} {cache.bytes // 1024} KiB" for cache in caches)
        notes.append(f"the system does not tell its cache sizes; usual ones are assumed: {sizes}")
    limit = memory_limit() // 4 if memory_bytes is None else memory_bytes
    teams = sorted({1, cores})
    sets = {count: working_sets(caches, count, cores, limit, target) for count in teams}
    if limit < 2 * sum(cache.within_reach(cores) for cache in caches):
        notes.append(
            f"reading from memory took {limit / 2**20:.0f} MiB at most, less than twice the "
            "caches: part of it came from there"
        )
    for count, who in {cores: "all cores", 1: "one thread"}.items():
        if missing := [cache.name for cache in caches if cache.name not in sets[count]]:
            notes.append(
                f"reading from {', '.join(missing)} is not measured on {who}: a thread's share of "
                "it is less than twice that of a nearer cache, so they cannot be told apart"
            )
    helpers = Helpers()
    try:
        runs = _runs(sets, target, helpers)
        for run in runs.values():
            run.calibrate(run_seconds)
        timings = interleave(runs, rounds=rounds, on_round=on_share)
        for _ in range(ATTEMPTS - 1):
            if not _disturbed(timings):
                break
            more = interleave(runs, rounds=rounds, on_round=on_share)
            timings = {
                label: min(timings[label], more[label], key=lambda timing: timing.best_ms)
                for label in runs
            }
    finally:
        helpers.close()
    if busy := _disturbed(timings):
        notes.append(
            f"the machine was busy: the median run of {', '.join(busy)} was far slower than the "
            "best one, so the ceilings may be too low; measure again when nothing else runs"
        )

    def ceiling(name: str, unit: str) -> Ceiling:
        labels = {n: _label(name, n) for n in teams if _label(name, n) in runs}
        best = {n: runs[text].work / timings[text].best_ms / 1e6 for n, text in labels.items()}
        median = {n: runs[text].work / timings[text].median_ms / 1e6 for n, text in labels.items()}
        size = {n: sets[n].get(name, 0) for n in teams}
        return Ceiling(
            name, unit, best[1], best.get(cores), median[1], median.get(cores), size[1], size[cores]
        )

    return Ceilings(
        describe_machine().processor,
        cores,
        caches,
        tuple(ceiling(p.name, p.unit) for p in probes.precisions(target)),
        tuple(ceiling(level, "GB/s") for level in sets[1]),
        tuple(notes),
    )


def working_sets(
    caches: tuple[Cache, ...], threads: int, cores: int, limit: int, target: Target
) -> dict[str, int]:
    """Choose what each thread reads so that it comes from one level and from no other.

    The nearest level: half of it. Each further one: the geometric mean of its own share and of the
    largest share of a nearer level, far from either, but at least 1.5 times the nearer one. Where
    its own share is less than twice the nearer one there is no room between them, as for the last
    level of many server processors when all cores read: it is left out. Memory: twice all caches
    together, within the limit.

    Parameters
    ----------
    caches : tuple of Cache
        By level.
    threads, cores : int
        How many read at the same time, of how many there could be.
    limit : int
        Most bytes to be read from memory, by all threads together.
    target : Target
        Its reading loop reads a whole number of its turns.

    Returns
    -------
    dict of str to int
        Bytes per thread, by level; levels that cannot be told apart are missing.
    """
    sizes: dict[str, float] = {}
    before = 0
    for cache in caches:
        share = cache.bytes // min(threads, cache.cores)
        if not before:
            sizes[cache.name] = share / 2
        elif share >= 2 * before:
            sizes[cache.name] = max(math.sqrt(before * share), 1.5 * before)
        before = max(before, share)
    # all levels, since some keep only what no other has; those of all cores, since a thread that
    # moves from core to core has them all
    sizes[MEMORY] = min(2 * sum(cache.within_reach(cores) for cache in caches), limit) / threads
    turn = probes.read_bytes(target)
    return {name: max(int(size) // turn, 1) * turn for name, size in sizes.items()}


def _label(name: str, threads: int) -> str:
    return f"{name} on {threads}"


def _disturbed(timings: dict[str, Timing]) -> list[str]:
    """Name the probes whose runs differ too much."""
    return [label for label, t in timings.items() if t.best_ms < QUIET * t.median_ms]


def _runs(sets: dict[int, dict[str, int]], target: Target, helpers: Helpers) -> dict[str, _Run]:
    """Prepare every probe on every number of threads, all on one block of memory."""
    block = _Block(sets, target)
    reading = compile_text(*probes.write_read(target), target)
    runs = {}
    for count, sizes in sets.items():
        for precision in probes.precisions(target):
            kernel = compile_text(*probes.write_multiply(precision, target), target)
            work = precision.operations(target)
            label = _label(precision.name, count)
            runs[label] = _Run(kernel, block, block.registers(count), work, 1, helpers)
        for level, size in sizes.items():
            work = probes.read_bytes(target)
            spans = block.spans(count, size)
            runs[_label(level, count)] = _Run(reading, block, spans, work, size // work, helpers)
    return runs


class _Block:
    """Memory that the probes work on, a part for each thread."""

    def __init__(self, sets: dict[int, dict[str, int]], target: Target) -> None:
        threads = max(sets)
        needed = max(size * count for count, sizes in sets.items() for size in sizes.values())
        # between the parts: what a probe writes at the end, and a cache line of distance
        self.room = probes.read_bytes(target)
        # written once: pages that never were are all one page of zeros
        self.bytes = np.ones(needed + (threads + 4) * self.room, np.uint8)
        self.vector = 4 * target.lanes
        vectors = 2 + probes.chains(target)
        random = np.random.default_rng(0)
        self.operands = random.random((threads, vectors * target.lanes + 1024), np.float32)

    def registers(self, threads: int) -> npt.NDArray[np.int64]:
        """Addresses of operands and sums of each thread; the third column is the count."""
        rows = [row.ctypes.data for row in self.operands[:threads]]
        return np.array([[at, at + 2 * self.vector, 0] for at in rows], np.int64)

    def spans(self, threads: int, size: int) -> npt.NDArray[np.int64]:
        """Start and end of what each thread reads; the third column is the count."""
        first = self.bytes.ctypes.data + -self.bytes.ctypes.data % self.vector
        starts = [first + i * (size + self.room) for i in range(threads)]
        return np.array([[start, start + size, 0] for start in starts], np.int64)


class _Run:
    """One probe on one or more threads; calling it runs it."""

    def __init__(
        self,
        kernel: int,
        block: _Block,
        arguments: npt.NDArray[np.int64],
        work_per_turn: int,
        least_turns: int,
        helpers: Helpers,
    ) -> None:
        self.kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(kernel)
        self.block = block  # the addresses in the arguments are valid as long as it lives
        self.arguments = arguments
        self.work_per_turn = work_per_turn
        self.helpers = helpers
        self.turns = self.least_turns = least_turns

    @property
    def work(self) -> float:
        """Operations or bytes of one call, all threads together."""
        return float(self.turns) * self.work_per_turn * len(self.arguments)

    def __call__(self) -> None:
        self.arguments[:, 2] = self.turns
        threads = len(self.arguments)
        together, done = threading.Barrier(threads), threading.Semaphore(0)

        def drive(thread: int) -> None:
            together.wait()
            self.kernel(*self.arguments[thread].tolist())
            done.release()

        def help_drive(thread: int) -> None:
            with suppress(threading.BrokenBarrierError):  # the caller gave up
                drive(thread)

        try:
            if threads > 1:
                self.helpers.start(help_drive, range(1, threads))
            drive(0)
            for _ in range(threads):
                done.acquire()
        except BaseException:  # such as Ctrl-C: nobody may wait for this thread any more
            together.abort()
            raise

    def calibrate(self, seconds: float) -> None:
        """Choose a number of turns that takes about so long."""
        self()  # compiles, starts threads, fills caches
        while True:
            start = time.perf_counter()
            self()
            spent = time.perf_counter() - start
            if spent >= seconds / 2:
                break
            self.turns *= 2
        self.turns = max(self.least_turns, int(self.turns * seconds / spent))


def _told_caches() -> tuple[Cache, ...]:
    """Return the caches of the cores that this process may use, empty where nothing tells them."""
    return system_caches(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ()


def ceilings_file() -> Path:
    """Return where the ceilings of this machine are kept, whether they are or not."""
    target, cores = host(), usable_cores()
    machine = describe_machine()
    texts = [probes.write_multiply(p, target)[1] for p in probes.precisions(target)]
    # the same processor has other caches under `taskset`, and in a larger virtual machine
    caches = [f"{cache.name} {cache.bytes} {cache.cores}" for cache in _told_caches()]
    parts = (
        str(_VERSION), machine.processor, target.triple, target.cpu, target.features, str(cores),
        llvmlite.__version__, probes.write_read(target)[1], *texts, *caches,
    )  # fmt: skip
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    return cache_folder() / f"ceilings-{digest}.json"


def _read(path: Path) -> Ceilings | None:
    """Return what is kept, or None where there is nothing that can be read."""
    try:
        return Ceilings.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("measuring again: cannot read the ceilings in %s (%s)", path, error)
        return None


def _keep(path: Path, measured: Ceilings) -> None:
    try:
        write_whole(path, json.dumps(asdict(measured)))
    except OSError as error:
        _log.warning("the ceilings are not kept: cannot write %s (%s)", path, error)

"""The threads that help with a call: started when first needed, kept off the caller's core."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Helpers:
    """A pool of threads for one engine; safe to use from several threads and after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._count = 0
        self._threads: list[int] = []
        self._avoided: tuple[int, int] | None = None
        self._process = os.getpid()

    def start(self, work: Callable[..., None], calls: list[tuple[Any, ...]]) -> list[Future[None]]:
        """Let threads do `work`; some may start late, or be cancelled before they start.

        Parameters
        ----------
        work : callable
            Called once by each thread.
        calls : list of tuple
            Its arguments, for each thread besides the caller's.

        Returns
        -------
        list of Future
            One per thread.
        """
        count = len(calls)
        if count < 1:
            return []
        with self._lock:
            if self._process != os.getpid():  # threads do not survive a fork
                self._reset()
            if self._count < count:
                if self._pool is not None:  # finishes what it has, then its threads end
                    self._pool.shutdown(wait=False)
                self._reset()
                self._pool = ThreadPoolExecutor(
                    count,
                    "blocksparse",
                    initializer=lambda: self._threads.append(threading.get_native_id()),
                )
                self._count = count
            assert self._pool is not None
            self._keep_off(_core())
            return [self._pool.submit(work, *arguments) for arguments in calls]

    def close(self) -> None:
        """End the threads; the next call of `start` makes new ones."""
        with self._lock:
            pool = self._pool if self._process == os.getpid() else None
            self._reset()
        if pool is not None:
            pool.shutdown()

    def _keep_off(self, core: int) -> None:
        """Let the threads run on any core but the caller's.

        Some kernels wake a thread on the core that wakes it and leave it there, although another
        core is idle: once that happened, ResNet-50 took 27 ms on two threads, like on one, call
        after call, in place of 15.
        """
        wanted = (core, len(self._threads))
        if core < 0 or wanted == self._avoided:
            return
        allowed = os.sched_getaffinity(0)
        for thread in list(self._threads):
            try:
                os.sched_setaffinity(thread, allowed - {core} or allowed)
            except OSError:  # it has just ended, or may not be moved: only a loss of speed
                continue
        self._avoided = wanted


def _core() -> int:
    """Return the core this thread runs on, or -1 where that cannot be told or changed."""
    if _sched_getcpu is None:
        return -1
    return int(_sched_getcpu())


_sched_getcpu = (
    getattr(ctypes.CDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None
)

"""The threads that help with a call: started when first needed, kept off the caller's core."""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import threading
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from .locks import Lock

_log = logging.getLogger(__name__)

_Call = tuple[Callable[..., None], int, tuple[Any, ...]]


class Helpers:
    """Threads of one engine; safe to use from several threads and after a fork.

    Attributes
    ----------
    pending : array of int64
        How many were asked for so far, and how many of them came, which the work itself counts. A
        thread that waits inside its work may end it when the first is larger.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.pending = array("q", [0, 0])
        self._process = os.getpid()
        self._reset()

    def _reset(self) -> None:
        # A plain queue, no futures: a pool of `concurrent.futures` took 40 microseconds of every
        # call, this 10; at 90 % sparsity a ResNet-18 takes 2700.
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._refused = False  # the system gave no more; asked again after `close`
        self._avoided: tuple[int, int] | None = None
        if self._process != os.getpid():  # whom the parent process asked for never comes
            self.pending[0] = self.pending[1]
            self._process = os.getpid()
        # threads that wait for work would outlive a network that was dropped without `close`
        self._end = weakref.finalize(self, _end, self._queue, self._threads)
        self._end.atexit = False

    def start(self, work: Callable[..., None], numbers: Sequence[int], *arguments: Any) -> None:
        """Let threads do `work`; nobody waits for them, and some may start late.

        Parameters
        ----------
        work : callable
            Called by each thread, with its number and the arguments; must not raise.
        numbers : sequence of int
            What the threads are called, from 1.
        arguments
            The same for all.
        """
        with self._lock:
            if self._process != os.getpid():  # threads do not survive a fork
                self._end.detach()
                self._reset()
            self._grow(max(numbers))
            if not self._threads:
                return
            self._keep_off(_core())
            for number in numbers[: len(self._threads)]:
                self._queue.put((work, number, arguments))
                self.pending[0] += 1

    def _grow(self, count: int) -> None:
        """Start threads until there are so many, or the system refuses: others do their work."""
        while len(self._threads) < count and not self._refused:
            name = f"blocksparse-{len(self._threads)}"
            # daemons: a process may end while they wait for work
            thread = threading.Thread(target=_serve, args=(self._queue,), name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._refused = True
                _log.warning(
                    "going on with %d of %d threads: %s", len(self._threads) + 1, count + 1, error
                )
                return
            self._threads.append(thread)

    def close(self) -> None:
        """End the threads; the next call of `start` makes new ones."""
        with self._lock:
            threads = self._threads if self._process == os.getpid() else []
            self._end()
            self._reset()
        for thread in threads:
            thread.join()

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
        for thread in self._threads:
            if thread.native_id is None:
                continue
            try:
                os.sched_setaffinity(thread.native_id, allowed - {core} or allowed)
            except OSError:  # it has just ended, or may not be moved: only a loss of speed
                continue
        self._avoided = wanted


def _end(calls: queue.SimpleQueue[_Call | None], threads: list[threading.Thread]) -> None:
    for _ in threads:
        calls.put(None)


def _serve(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        work, number, arguments = call
        work(number, *arguments)
        # while this thread waits, it must not keep alive what it worked on
        del call, work, arguments


def _core() -> int:
    """Return the core this thread runs on, or -1 where that cannot be told or changed."""
    if _sched_getcpu is None:
        return -1
    return int(_sched_getcpu())


_sched_getcpu = (
    getattr(ctypes.CDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None
)

"""Threads that each take images of their own through the whole network."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence

from .helpers import Helpers


class Streams:
    """Helper threads of one engine that do pieces of work on their own, one after the other."""

    def __init__(self) -> None:
        self._helpers = Helpers()

    def run(self, work: Callable[[slice, int], None], parts: Sequence[slice], threads: int) -> None:
        """Do all parts; who has done one takes the next.

        Parameters
        ----------
        work : callable
            Called with a part, and the number of the thread: 0, the caller's, to ``threads - 1``.
        parts : sequence of slice
            What there is to do.
        threads : int
            At least 2; at most so many parts are done at a time. If a thread comes late, or the
            system gives none, the others do its parts.

        Raises
        ------
        BaseException
            What a call of `work` raised; parts that nobody had begun are left undone then.
        """
        left = deque(parts)
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def take(thread: int) -> None:
            try:
                while True:
                    try:
                        part = left.popleft()
                    except IndexError:
                        return
                    work(part, thread)
                    done.put(None)
            except BaseException as error:  # the caller raises it
                left.clear()
                done.put(error)

        self._helpers.start(take, range(1, threads))
        take(0)
        for _ in parts:
            error = done.get()
            if error is not None:
                raise error

    def close(self) -> None:
        """End the threads; the next call makes new ones."""
        self._helpers.close()

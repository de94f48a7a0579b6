"""A lock that is open in the child of a fork, whoever held it in the parent."""

from __future__ import annotations

import os
import threading
import weakref


class Lock:
    """A lock for ``with``; a child process begins with a fresh one.

    The thread that holds a lock does not survive a fork, so nobody would open it in the child.
    What it guards must be whole at any time, also while the lock is held.
    """

    def __init__(self) -> None:
        self._renew()
        _locks.add(self)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in _locks:
        lock._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)

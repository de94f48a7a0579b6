"""What is made anew in the child of a fork: a lock that is open, whoever held it in the parent."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Renewable(Protocol):
    """What a child process must not take over from its parent as it is."""

    def renew(self) -> None:
        """Begin anew: this process is a child, and no thread but this one is in it."""


def renew_after_fork(what: Renewable) -> None:
    """Let `what` be renewed in every child process, as long as it lives."""
    _renewed.add(what)


class Lock:
    """A lock for ``with``; a child process begins with a fresh one.

    The thread that holds a lock does not survive a fork, so nobody would open it in the child.
    What it guards must be whole at any time, also while the lock is held.
    """

    def __init__(self) -> None:
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Open the lock."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


_renewed: weakref.WeakSet[Renewable] = weakref.WeakSet()


def _renew_all() -> None:
    for what in _renewed:
        what.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)

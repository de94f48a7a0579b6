"""The ledger of ids that `channels` keeps while it follows a network: labels, ties, fixed ids."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np


class Ledger:
    """Deals ids, and remembers where each was made, what it is tied to, and what must not move.

    Parameters
    ----------
    canonical : mapping of str to str
        For each name of a parameter or buffer the name under which its ids are kept.

    Attributes
    ----------
    canonical : mapping of str to str
        As given.
    params : dict
        (name, axis) of a parameter or buffer -> int64 ids along that axis.
    reasons : dict
        Why ids are fixed -> how many.
    """

    def __init__(self, canonical: Mapping[str, str]) -> None:
        self.canonical = canonical
        self.params: dict[tuple[str, int], np.ndarray] = {}
        self.reasons: dict[str, int] = {}
        self.count = 0
        self._origin = np.zeros(1024, dtype=np.int64)  # label from which labels of others are made
        self._labels = np.zeros(1024, dtype=np.int64)  # origin and, for parameters, all uses
        self._known: dict[Hashable, int] = {}
        self._tied: list[tuple[np.ndarray, np.ndarray]] = []
        self._fixed: list[np.ndarray] = []

    @property
    def labels(self) -> np.ndarray:
        """int64 [count], the label of each id."""
        return self._labels[: self.count]

    @property
    def ties(self) -> tuple[np.ndarray, np.ndarray]:
        """Two int64 arrays: the first entries are tied to each other, and so on."""
        none = np.zeros(0, dtype=np.int64)
        return (
            np.concatenate([none, *(one for one, _ in self._tied)]),
            np.concatenate([none, *(other for _, other in self._tied)]),
        )

    @property
    def fixed(self) -> np.ndarray:
        """int64, the ids that must not move."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self._fixed])

    def label(self, *key: Hashable) -> int:
        """Return the label of ``key``: the same for the same key."""
        return self._known.setdefault(key, len(self._known))

    def origins(self, ids: np.ndarray) -> np.ndarray:
        """Return the labels that say where ``ids`` were made."""
        return self._origin[ids]

    def joint(self, key: Hashable, *labels: np.ndarray) -> np.ndarray:
        """Return one label for each combination of ``labels``, under ``key``."""
        rows = np.stack([np.asarray(one).reshape(-1) for one in labels], 1)
        found, inverse = np.unique(rows, axis=0, return_inverse=True)
        made = np.array([self.label(key, *row) for row in found.tolist()], dtype=np.int64)
        return made[inverse.reshape(-1)].reshape(np.shape(labels[0]))

    def new(self, labels: np.ndarray) -> np.ndarray:
        """Return a fresh id for each of ``labels``, in their shape."""
        first, self.count = self.count, self.count + labels.size
        if self.count > len(self._labels):
            room = np.zeros(2 * self.count - len(self._labels), dtype=np.int64)
            self._origin = np.concatenate([self._origin, room])
            self._labels = np.concatenate([self._labels, room])
        self._origin[first : self.count] = labels.reshape(-1)
        self._labels[first : self.count] = labels.reshape(-1)
        return np.arange(first, self.count).reshape(labels.shape)

    def param(self, name: str, axis: int, length: int) -> np.ndarray:
        """Return the ids along an axis of a parameter or buffer: int64 [length]."""
        key = (self.canonical[name], axis)
        if key not in self.params:
            self.params[key] = self.new(np.full(length, self.label("parameter", *key)))
        return self.params[key]

    def use(self, ids: np.ndarray, key: Hashable, labels: np.ndarray) -> None:
        """Note that ids of a parameter are used under ``key`` with ids of ``labels``."""
        self._labels[ids] = self.joint(("use", key), self._labels[ids], labels)

    def tie(self, ids: np.ndarray, others: np.ndarray) -> None:
        """Tie ids to others of the same shape: they move together."""
        self._tied.append((ids.reshape(-1), others.reshape(-1)))

    def fix(self, ids: np.ndarray, reason: str = "") -> None:
        """Leave ids where they are. Without a reason it is in the nature of the network."""
        self._fixed.append(ids.reshape(-1))
        if reason:
            self.reasons[reason] = self.reasons.get(reason, 0) + len(np.unique(ids))

    def places(self) -> tuple[list[tuple[str, int]], np.ndarray, np.ndarray]:
        """Return where ids lie: the keys of `params`, and for each id which of them and where.

        Returns
        -------
        keys : list of (str, int)
        which : ndarray
            int64 [count], index into ``keys``, -1 for an id that is no parameter's.
        position : ndarray
            int64 [count], index along the axis.
        """
        keys = list(self.params)
        which = np.full(self.count, -1)
        position = np.zeros(self.count, dtype=np.int64)
        for number, ids in enumerate(self.params.values()):
            which[ids] = number
            position[ids] = np.arange(len(ids))
        return keys, which, position

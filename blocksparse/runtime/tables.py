"""Side tables of a program: small integers, and arrays known by address."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class Tables:
    """Collects what records refer to."""

    def __init__(self) -> None:
        self._integers: list[npt.NDArray[np.int64]] = []
        self._length = 0
        self.kept: list[npt.NDArray] = []
        self.integers([0, 0])  # place 0: the plane shifts of a copy that has no planes

    def integers(self, values: npt.ArrayLike) -> int:
        """Append integers; return their place."""
        array = np.asarray(values, np.int64).reshape(-1)
        self._integers.append(array)
        self._length += len(array)
        return self._length - len(array)

    def address(self, array: npt.NDArray) -> int:
        """Keep an array alive with the tables; return its address."""
        self.kept.append(array)
        return int(array.ctypes.data)

    def joined(self) -> npt.NDArray[np.int64]:
        """Return all integers, as the program takes them."""
        return np.concatenate(self._integers)

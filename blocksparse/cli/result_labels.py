"""Where the labels of a plot stand: near their marks, covering nothing.

Shape letters: L labels, B boxes. A box is ``(left, bottom, right, top)``; all lengths are in one
unit, such as pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["box", "overlap", "place_labels"]

Floats = NDArray[np.float64]

# Where a label may stand, seen from its mark: near before far; right, left, above, below.
DISTANCES = (14, 18, 25, 33, 44, 58, 75, 95)
ANGLES = np.pi / 8 * np.array([0, 8, 4, 12, 1, 15, 7, 9, 2, 14, 6, 10, 3, 13, 5, 11])


def place_labels(marks: Floats, sizes: Floats, obstacles: Floats, inside: Floats) -> Floats:
    """Give each label the nearest place where it covers no obstacle and no other label.

    Greedy, in the order given; where no place is free, the one where least is covered.

    Parameters
    ----------
    marks
        ``[L, 2]``: the points that the labels belong to.
    sizes
        ``[L, 2]``: width and height of each label.
    obstacles
        ``[B, 4]``: boxes that should not be covered, those of the marks among them.
    inside
        ``[4]``: the box that labels should not leave.

    Returns
    -------
    array
        ``[L, 2]``: the middle of each label.
    """
    far, angle = (grid.ravel() for grid in np.meshgrid(DISTANCES, ANGLES, indexing="ij"))
    taken = np.asarray(obstacles, np.float64).reshape(-1, 4)
    middles = np.empty((len(marks), 2))
    for row, (mark, (width, height)) in enumerate(zip(marks, sizes, strict=True)):
        # The distance is that of the label's nearer end, however long it is.
        across = (far + max(width - height, 0) / 2) * np.cos(angle)
        spots = mark + np.stack([across, far * np.sin(angle)], axis=1)
        boxes = box(spots, np.array([width, height]))
        covered = overlap(boxes[:, None], taken[None]).sum(1)
        covered += width * height - overlap(boxes, inside)
        best = int(np.argmin(covered.round(3)))  # the first of those that cover nothing
        middles[row] = spots[best]
        taken = np.concatenate([taken, boxes[best : best + 1]])
    return middles


def box(middle: Floats, size: Floats) -> Floats:
    """Return boxes ``[..., 4]`` from their middles and their widths and heights ``[..., 2]``."""
    return np.concatenate([middle - size / 2, middle + size / 2], axis=-1)


def overlap(one: Floats, other: Floats) -> Floats:
    """Return the area that boxes ``[..., 4]`` share, over broadcast leading axes."""
    low = np.maximum(one[..., :2], other[..., :2])
    high = np.minimum(one[..., 2:], other[..., 2:])
    return np.clip(high - low, 0, None).prod(-1)

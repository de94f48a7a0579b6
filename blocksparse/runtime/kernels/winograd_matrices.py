"""The matrices of Winograd's minimal filtering F(4, 3), applied along image columns.

Four outputs of a filter of three taps need six multiplications instead of twelve:
``y = A (G w * B x)`` with x six inputs, w three weights, ``*`` elementwise (Winograd 1980; Lavin
and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016). The points are 0, 1, -1, 2, -2
and infinity.
"""

from __future__ import annotations

TAPS, OUTPUTS = 3, 4
PLANES = TAPS + OUTPUTS - 1

INPUT: list[list[float]] = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
"""B: six rows of pixels to six planes."""

WEIGHT: list[list[float]] = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
"""G: three taps to six planes."""

OUTPUT: list[list[float]] = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
]
"""A: six planes to four rows of outputs."""

"""The matrices of Winograd's minimal filtering F(4, 3), applied along image columns.

Four outputs of a filter of three taps need six multiplications instead of twelve:
``y = A (G w * B x)`` with x six inputs, w three weights, ``*`` elementwise (Winograd 1980; Lavin
and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016).

The points are 0, 1/2, -1/2, 3/2, -3/2 and infinity. The usual 0, 1, -1, 2, -2 round worse: over 128
channels of random numbers, F(4x4, 3x3) was off by 5.5 times the error of direct sums with those and
by 3.0 times with these (Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd
Convolution for Deep Neural Networks", 2020, search for such points). All entries but those of G are
exact in float32.
"""

from __future__ import annotations

TAPS, OUTPUTS = 3, 4
PLANES = TAPS + OUTPUTS - 1

INPUT: list[list[float]] = [
    [9 / 16, 0, -5 / 2, 0, 1, 0],
    [0, -9 / 8, -9 / 4, 1 / 2, 1, 0],
    [0, 9 / 8, -9 / 4, -1 / 2, 1, 0],
    [0, -3 / 8, -1 / 4, 3 / 2, 1, 0],
    [0, 3 / 8, -1 / 4, -3 / 2, 1, 0],
    [0, 9 / 16, 0, -5 / 2, 0, 1],
]
"""B: six rows of pixels to six planes."""

WEIGHT: list[list[float]] = [
    [16 / 9, 0, 0],
    [-1, -1 / 2, -1 / 4],
    [-1, 1 / 2, -1 / 4],
    [1 / 9, 1 / 6, 1 / 4],
    [1 / 9, -1 / 6, 1 / 4],
    [0, 0, 1],
]
"""G: three taps to six planes."""

OUTPUT: list[list[float]] = [
    [1, 1, 1, 1, 1, 0],
    [0, 1 / 2, -1 / 2, 3 / 2, -3 / 2, 0],
    [0, 1 / 4, 1 / 4, 9 / 4, 9 / 4, 0],
    [0, 1 / 8, -1 / 8, 27 / 8, -27 / 8, 1],
]
"""A: six planes to four rows of outputs."""

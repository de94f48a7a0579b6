"""The matrices of Winograd's minimal filtering, applied along the columns or rows of an image.

F(m, r) computes m outputs of a filter of r taps from n = m + r - 1 inputs with n multiplications in
place of m * r: ``y = A (G w * B x)`` with x the inputs, w the weights, ``*`` elementwise (Winograd
1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016). The entries are
those of Toom and Cook's multiplication of polynomials, transposed: n - 1 points and infinity.

Which points decides how much rounding errors grow. Over 128 channels of random numbers, F(4x4, 3x3)
was off by 5.5 times the error of direct sums with the usual 0, 1, -1, 2, -2, and by 3.0 times with
those here; in one direction only, F(4, 3) by 1.4, F(5, 4) by 2.3, F(4, 5) and F(2, 7) by 2.1 times.
F(4, 7) would be at 4.6 at least (Barabasz et al., "Error Analysis and Improving the Accuracy of
Winograd Convolution for Deep Neural Networks", 2020, search for such points).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

Matrix = list[list[float]]

POINTS = {6: (0, 1 / 2, -1 / 2, 3 / 2, -3 / 2), 8: (0, 1 / 2, -1 / 2, 1, -1, 2, -2)}
"""Where polynomials are evaluated, besides infinity, by the number of planes. Where there is a
point there is its opposite, so their rows of B share sums, and their columns of A."""


@dataclass(frozen=True)
class Filtering:
    """F(m, r), as matrices.

    Parameters
    ----------
    taps, outputs : int
        r and m.
    input : list of list of float, n by n
        B: pixels to planes. All entries are exact in float32.
    weight : list of list of float, n by r
        G: taps to planes.
    output : list of list of float, m by n
        A: planes to outputs. All entries are exact in float32.
    """

    taps: int
    outputs: int
    input: Matrix
    weight: Matrix
    output: Matrix

    @property
    def planes(self) -> int:
        """Inputs of one tile, and planes: n."""
        return self.taps + self.outputs - 1


def filtering(taps: int, outputs: int) -> Filtering:
    """Return the matrices of F(outputs, taps)."""
    points = POINTS[taps + outputs - 1]
    others = [[other for other in points if other != point] for point in points]
    weight = [
        [point**k / prod(point - other for other in rest) for k in range(taps)]
        for point, rest in zip(points, others, strict=True)
    ]
    infinity = [0.0] * (taps - 1) + [1.0]
    return Filtering(
        taps,
        outputs,
        [[*_with_roots(rest), 0.0] for rest in others] + [_with_roots(points)],
        [*weight, infinity],
        [
            [*(float(point**k) for point in points), 1.0 if k == outputs - 1 else 0.0]
            for k in range(outputs)
        ],
    )


def _with_roots(roots: tuple[float, ...] | list[float]) -> list[float]:
    """Coefficients of the polynomial with these roots, that of power 0 first."""
    polynomial = [1.0]
    for root in roots:
        longer = zip([0.0, *polynomial], [*polynomial, 0.0], strict=True)
        polynomial = [shifted - root * same for shifted, same in longer]
    return polynomial


FILTERINGS = {3: filtering(3, 4), 4: filtering(4, 5), 5: filtering(5, 4), 7: filtering(7, 2)}
"""What serves a kernel of so many taps: n is 6, 8, 8 and 8."""

ALONG = {taps: found for taps, found in FILTERINGS.items() if found.outputs in (2, 4)}
"""What can go along the rows: vectors of pixels are taken apart by two or four."""

OUTPUTS, PLANES = FILTERINGS[3].outputs, FILTERINGS[3].planes
"""Of tiles in both directions, along each side: those of 3 taps."""

"""The multiple-choice knapsack: one choice per group, the least loss within limits on costs.

Choosing a sparsity for every layer so that the network fits a budget is this problem: layers are
the groups, sparsities the choices, predicted loss is what is kept small, and milliseconds, weights
or multiply-adds are the costs. (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, chapter
11.) It is handed to HiGHS as an integer programme, which proves its answer the best or says how far
off it can be at most.
"""

# G groups   C_g choices of group g

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

_EXCESS = 1e-6
"""By how much of itself a limit may be exceeded: what HiGHS takes for zero."""


@dataclass(frozen=True)
class Limit:
    """A sum that must not be exceeded.

    Parameters
    ----------
    name : str
        What it is, with its unit, for errors: "milliseconds".
    costs : sequence of sequence of float
        [G][C_g], what each choice costs. Negative where it earns: "at least" is "at most" of the
        negated.
    most : float
        What the chosen costs may sum to.
    """

    name: str
    costs: Sequence[Sequence[float]]
    most: float


@dataclass(frozen=True)
class Solution:
    """What was chosen.

    Parameters
    ----------
    chosen : tuple of int
        [G], the index of the choice of each group.
    loss : float
        The sum of their losses.
    bound : float
        No choice within the limits has less.
    """

    chosen: tuple[int, ...]
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How much less loss there could be at most.

        Where the choice is proved the best, less than a millionth of the largest loss of a group.
        """
        return max(self.loss - self.bound, 0.0)


class Infeasible(ValueError):
    """No choice keeps within the limits."""


def solve(
    losses: Sequence[Sequence[float]], limits: Sequence[Limit], seconds: float = 60.0
) -> Solution:
    """Choose one of every group's choices so that the losses sum to the least within all limits.

    Parameters
    ----------
    losses : sequence of sequence of float
        [G][C_g], at least one choice in every group.
    limits : sequence of Limit
        Maybe none.
    seconds : float
        When to stop and take the best found so far; its `Solution.gap` then says what it lacks.

    Returns
    -------
    Solution
        Its limits are kept but for a millionth of each, and of what lies between it and the least
        that there could be.

    Raises
    ------
    Infeasible
        If no choice keeps within the limits; the text says what each could come to at least.
    ValueError
        If a number is not finite, or the shapes differ.

    Examples
    --------
    >>> time = Limit("ms", [[3.0, 1.0], [3.0, 1.0]], most=4.0)
    >>> solve([[0.0, 0.5], [0.0, 0.2]], [time]).chosen
    (0, 1)
    """
    sizes = [len(group) for group in losses]
    _check(sizes, losses, limits)
    if not sizes:
        return Solution((), 0.0, 0.0)
    for limit in limits:
        least = sum(map(min, limit.costs))
        if least > limit.most + _EXCESS * abs(limit.most):
            raise Infeasible(
                f"{limit.name}: at most {limit.most:g} is allowed, and the least that can be had "
                f"is {least:g}"
            )
    objective = np.concatenate([np.asarray(group, dtype=float) for group in losses])
    group = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(len(group)), (group, np.arange(len(group)))))
    constraints = [LinearConstraint(one_each, 1.0, 1.0)]
    possible = np.ones(len(group), dtype=bool)
    if limits:
        rows = np.stack([_excess(limit) for limit in limits])
        possible = np.all(rows <= 1.0, axis=0)
        rows[:, ~possible] = 0.0
        constraints.append(LinearConstraint(csr_array(rows), -np.inf, 1.0))
    scale = float(np.abs(objective).max()) or 1.0
    result = milp(
        objective / scale,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0.0, possible),
        constraints=constraints,
        options={"mip_rel_gap": 0.0, "time_limit": seconds},
    )
    if result.x is None:
        sums = "; ".join(
            f"{limit.name}: at most {limit.most:g}, alone {sum(map(min, limit.costs)):g} could be"
            for limit in limits
        )
        raise Infeasible(f"no choice keeps within all limits together ({sums}): {result.message}")
    ends = np.cumsum([0, *sizes])
    chosen = tuple(int(np.argmax(result.x[a:b])) for a, b in pairwise(ends))
    loss = float(sum(group[index] for group, index in zip(losses, chosen, strict=True)))
    return Solution(chosen, loss, min(float(result.mip_dual_bound) * scale, loss))


def _excess(limit: Limit) -> npt.NDArray[np.float64]:
    """Return what each choice costs more than its group's least, as a share of what may be.

    HiGHS has absolute tolerances, and takes coefficients below 1e-9 for none. Of these shares the
    chosen must not sum to more than 1, and no choice above 1 can be one of them: what is left is
    neither large nor, where it counts, small.
    """
    costs = [np.asarray(group, dtype=float) for group in limit.costs]
    room = limit.most + _EXCESS * abs(limit.most) - sum(group.min() for group in costs)
    more = np.concatenate([group - group.min() for group in costs])
    return more / room if room > 0 else np.where(more > 0, np.inf, 0.0)


def _check(
    sizes: Sequence[int], losses: Sequence[Sequence[float]], limits: Sequence[Limit]
) -> None:
    for name, table in [("losses", losses), *((limit.name, limit.costs) for limit in limits)]:
        if [len(group) for group in table] != list(sizes) or 0 in sizes:
            raise ValueError(
                f"{name}: has {[len(group) for group in table]} choices per group, the losses "
                f"{list(sizes)}; both need the same, at least one in every group"
            )
        if not all(np.isfinite(value) for group in table for value in group):
            raise ValueError(f"{name}: a value is not finite")

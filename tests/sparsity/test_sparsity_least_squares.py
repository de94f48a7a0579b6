"""Masked least squares against brute force on the images themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksparse.sparsity.calibration import Moments
from blocksparse.sparsity.least_squares import MaskedLeastSquares

DAMPING = 0.01


class Case:
    """A layer of a few outputs and inputs, what it got, and the solution by numpy's lstsq."""

    def __init__(self, outputs: int, inputs: int, pixels: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.weight = rng.standard_normal((outputs, inputs))
        self.x = rng.standard_normal((inputs, pixels)) * rng.uniform(0.1, 2.0, (inputs, 1))
        self.d = self.x + 0.3 * rng.standard_normal((inputs, pixels))
        self.e = 0.3 * rng.standard_normal((outputs, pixels))
        self.ridge = DAMPING * float((self.x**2).mean())

    def problem(self) -> MaskedLeastSquares:
        x, d, e = (torch.from_numpy(part) for part in (self.x, self.d, self.e))
        pixels = x.shape[1]
        found = Moments(x @ x.T / pixels, d @ x.T / pixels, e @ x.T / pixels)
        return MaskedLeastSquares(torch.from_numpy(self.weight), found, DAMPING)

    def row(self, k: int, kept: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the best weights of output ``k`` with zeros where not ``kept``, and what is left.

        Each image is an equation, and so is each weight that is not to move.
        """
        pixels = self.x.shape[1]
        wanted = self.weight[k] @ self.d + self.e[k]
        ridge = np.sqrt(self.ridge * pixels) * np.eye(len(self.x))
        equations = np.concatenate([self.x.T, ridge])
        values = np.concatenate([wanted, ridge @ self.weight[k]])
        best = np.zeros(len(self.x))
        if kept.any():
            best[kept] = np.linalg.lstsq(equations[:, kept], values, rcond=None)[0]
        return best, float(((equations @ best - values) ** 2).sum() / pixels)


cases = st.builds(
    Case, st.integers(1, 5), st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**16)
)


@settings(max_examples=50)
@given(case=cases)
def test_solution_is_that_of_brute_force(case: Case) -> None:
    mask = case.rng.random(case.weight.shape) < 0.6
    found = case.problem().solve(torch.from_numpy(mask)).numpy()
    want = np.array([case.row(k, kept)[0] for k, kept in enumerate(mask)])
    assert not found[~mask].any()
    # lstsq works on the equations, Cholesky on their products: the condition squared, at most
    # inputs * 2^2 / (0.01 * mean) here.
    np.testing.assert_allclose(found, want, rtol=1e-7, atol=1e-9)


@settings(max_examples=50)
@given(case=cases, together=st.integers(1, 4))
def test_losses_are_what_dropping_costs(case: Case, together: int) -> None:
    mask = case.rng.random(case.weight.shape) < 0.8
    sets = case.rng.permutation(case.weight.shape[1]) // together  # not in order, the last smaller
    squares = case.problem().losses(torch.from_numpy(mask), torch.from_numpy(sets)).square().numpy()
    assert not squares[~mask].any()
    for k, kept in enumerate(mask):
        before = case.row(k, kept)[1]
        for index in np.unique(sets):
            grown = case.row(k, kept & (sets != index))[1] - before
            loss = squares[k, sets == index].sum()
            assert loss == pytest.approx(grown, rel=1e-6, abs=1e-9)


def test_dead_and_equal_inputs_have_a_solution() -> None:
    case = Case(3, 6, 20, 0)
    case.x[2] = case.d[2] = 0.0
    case.x[4], case.d[4] = case.x[3], case.d[3]
    case.ridge = DAMPING * float((case.x**2).mean())
    problem = case.problem()
    mask = np.ones((3, 6), dtype=bool)
    mask[:, 0] = False
    found = problem.solve(torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(found, [case.row(k, kept)[0] for k, kept in enumerate(mask)])
    np.testing.assert_allclose(found[:, 2], case.weight[:, 2])  # nothing speaks for moving it
    losses = problem.losses(torch.ones(3, 6, dtype=torch.bool), torch.arange(6)).square()
    np.testing.assert_allclose(losses[:, 2], case.ridge * case.weight[:, 2] ** 2)


def test_layer_without_any_input_keeps_its_weights() -> None:
    weight = torch.randn(2, 3, generator=torch.manual_seed(0))
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    found = Moments(nothing, nothing, nothing[:2])
    problem = MaskedLeastSquares(weight, found, DAMPING)
    torch.testing.assert_close(problem.solve(torch.ones(2, 3, dtype=torch.bool)), weight.double())


def test_inputs_that_are_not_finite_are_refused() -> None:
    broken = torch.full((3, 3), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        MaskedLeastSquares(torch.ones(2, 3), Moments(broken, broken, broken[:2]), DAMPING)

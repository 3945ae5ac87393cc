"""Exponential Rosenbrock tableaus: the stiff order conditions and slopes in dense NumPy."""

import dataclasses
import functools as ft
from fractions import Fraction

import numpy as np
import pytest

from nksolve.ode.rosenbrock.exponential_tableaus import EXPRB32, EXPRB43
from tests.helpers import dense_steps as steps

BOTH = [pytest.param(EXPRB32, id="Exprb32"), pytest.param(EXPRB43, id="Exprb43")]


def _moment(tableau, weights, power):
    """Σᵢ bᵢ(z) cᵢ^power as coefficients of φ₁ … φ₄."""
    total = [Fraction(0)] * 4
    for c, row in zip(tableau.nodes, weights, strict=True):
        for k, value in enumerate(row):
            total[k] += Fraction(value) * Fraction(c) ** power
    return total


def _stiff_order(tableau, weights):
    """2 by the way the scheme is written; 3 if Σ bᵢcᵢ² = 2φ₃; 4 if also Σ bᵢcᵢ³ = 6φ₄."""
    if _moment(tableau, weights, 2) != [0, 0, 2, 0]:
        return 2
    return 4 if _moment(tableau, weights, 3) == [0, 0, 0, 6] else 3


@pytest.mark.parametrize("tableau", BOTH)
def test_stiff_order(tableau):
    assert _stiff_order(tableau, tableau.b) == tableau.order
    assert _stiff_order(tableau, tableau.b_hat) == tableau.embedded_order
    padded = np.zeros((3, tableau.stages, 4))
    for table, rows in zip(padded, (tableau.b, tableau.b_hat, tableau.error_weights), strict=True):
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
    np.testing.assert_array_equal(padded[0] - padded[1], padded[2])
    assert isinstance(hash(tableau), int)


@pytest.mark.parametrize("tableau", BOTH)
def test_slope(tableau):
    for weights, order in ((tableau.b, tableau.order), (tableau.b_hat, tableau.embedded_order)):
        step = ft.partial(steps.exponential_step, tableau, weights)
        slope, _ = steps.order_of(step, steps.ring(), (32, 64))
        assert abs(slope - order) < 0.2


@pytest.mark.parametrize("tableau", BOTH)
def test_slope_where_the_problem_is_stiff(tableau):
    """h‖J‖ from 100 to 400: no reduction."""
    for weights, order in ((tableau.b, tableau.order), (tableau.b_hat, tableau.embedded_order)):
        step = ft.partial(steps.exponential_step, tableau, weights)
        slope, _ = steps.order_of(step, steps.heat(), (16, 32))
        assert abs(slope - order) < 0.2


@pytest.mark.parametrize("tableau", BOTH)
def test_linear_problems_are_solved_exactly(tableau):
    """y' = Ay + c + ts in one step: exponential Rosenbrock–Euler is exact, and D vanishes."""
    rng = np.random.default_rng(0)
    matrix, c, s, y = (rng.standard_normal(shape) for shape in ((4, 4), 4, 4, 4))
    problem = steps.Problem(
        lambda t, y: matrix @ y + c + t * s,
        lambda t, y: matrix,
        lambda t, y: s,
        y,
        1.0,
        y,
        np.eye(4),
    )
    t, h = 0.4, 0.7
    found = steps.exponential_step(tableau, tableau.b, problem, t, y, h)
    big = np.zeros((6, 6))
    big[:4, :4], big[:4, 4], big[:4, 5], big[5, 4] = matrix, c, s, 1.0
    exact = steps.sla.expm(h * big) @ np.concatenate((y, (1.0, t)))
    np.testing.assert_allclose(found, exact[:4], rtol=1e-12)


def test_phi_sum_is_the_series():
    """φ_k(z) = Σ_j zʲ/(j + k)!"""
    z, terms, factorial = 0.6, np.zeros(4), np.cumprod(np.concatenate(([1.0], np.arange(1, 40.0))))
    for k in range(1, 5):
        terms[k - 1] = sum(z**j / factorial[j + k] for j in range(30))
    for k in range(4):
        vectors = [np.array([float(k == j)]) for j in range(4)]
        np.testing.assert_allclose(steps.phi_sum(np.array([[z]]), vectors), terms[k], rtol=1e-14)


def test_bad_tableaus_are_refused():
    with pytest.raises(ValueError, match="rows, one for each node"):
        dataclasses.replace(EXPRB32, nodes=(0.0, 0.5, 1.0))
    with pytest.raises(ValueError, match="row i of a"):
        dataclasses.replace(EXPRB32, a=((), ()))
    with pytest.raises(ValueError, match="first stage"):
        dataclasses.replace(EXPRB32, b=((1.0,), (0.0, 0.0, 2.0)))

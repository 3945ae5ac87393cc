"""Rosenbrock tableaus: order conditions by trees, stability, slopes in dense NumPy."""

import dataclasses
import functools as ft
from typing import Any

import numpy as np
import pytest

from nksolve.ode.rosenbrock.tableau import RosenbrockTableau, from_row_form
from nksolve.ode.rosenbrock.tableaus import RODAS4, RODAS5P, ROK4, ROSENBROCK23
from tests.helpers import dense_steps as steps, rooted_trees as trees

ALL = (ROSENBROCK23, RODAS4, RODAS5P, ROK4)
EXACT = 1e-13


def named(tableaus):
    return [pytest.param(tableau, id=tableau.name) for tableau in tableaus]


def _residual(weights, row, order, family, stage_weights=trees.stage_weights):
    """The worst order condition of `family` at exactly this order."""
    found = [abs(weights @ stage_weights(t, row) - float(trees.wanted(t))) for t in family(order)]
    return max(found)


def _worst(weights, row, order, family, stage_weights=trees.stage_weights):
    return max(_residual(weights, row, k, family, stage_weights) for k in range(1, order + 1))


def _dense_residual(tableau, row, order, family):
    """The same for y(t₀ + θh), whose conditions hold for 1/γ(t) times θ to the order of t."""
    powers = tableau.dense_coefficients() @ row.gamma
    worst = 0.0
    for theta in (0.2, 0.55, 0.9):
        weights = theta ** np.arange(1, len(powers) + 1) @ powers
        for tree in family(order):
            exact = theta**order * float(trees.wanted(tree))
            worst = max(worst, abs(weights @ trees.stage_weights(tree, row) - exact))
    return worst


def _defect(tableau):
    """How far a tableau is from everything that is said of it without a mass matrix."""
    row = tableau.row_form()
    worst = [
        np.abs(row.alpha.sum(axis=1) - tableau.alpha_i).max(),
        np.abs(row.gamma.sum(axis=1) - tableau.gamma_i).max(),
        _worst(row.b, row, tableau.order, trees.rooted),
        _worst(row.b_hat, row, tableau.embedded_order, trees.rooted),
    ]
    if tableau.dense:
        orders = range(1, tableau.dense_order + 1)
        worst += [_dense_residual(tableau, row, k, trees.rooted) for k in orders]
    return max(worst)


def _stability(row, weights, z):
    """R(z) = 1 + z bᵀ(I − zB)⁻¹1 with B = α + Γ."""
    ones = np.ones(weights.size)
    matrix = np.eye(weights.size) - z * (row.alpha + row.gamma)
    return 1.0 + z * weights @ np.linalg.solve(matrix, ones)


def _stability_at_infinity(row, weights):
    """R(∞) = 1 − bᵀB⁻¹1."""
    return 1.0 - weights @ np.linalg.solve(row.alpha + row.gamma, np.ones(weights.size))


def test_numbers_of_trees():
    """Hairer, Nørsett & Wanner I, table II.2.1; Hairer & Wanner II, IV.7 (W-methods); one
    condition more than a Rosenbrock method up to order 4 for a Rosenbrock-Krylov method."""
    assert [len(trees.rooted(k)) for k in range(1, 7)] == [1, 1, 2, 4, 9, 20]
    assert [len(trees.two_coloured(k)) for k in range(1, 5)] == [1, 2, 5, 13]
    assert [len(trees.krylov_trees(k)) for k in range(1, 5)] == [1, 1, 2, 5]


@pytest.mark.parametrize("tableau", named(ALL))
def test_order(tableau):
    assert _defect(tableau) < EXACT
    row = tableau.row_form()
    assert _residual(row.b, row, tableau.order + 1, trees.rooted) > 1e-3
    assert _residual(row.b_hat, row, tableau.embedded_order + 1, trees.rooted) > 1e-3
    if tableau.dense:
        assert _dense_residual(tableau, row, tableau.dense_order + 1, trees.rooted) > 1e-3


@pytest.mark.parametrize("tableau", named(ALL))
def test_order_with_another_matrix(tableau):
    row = tableau.row_form()
    for family, order in (
        (trees.two_coloured, tableau.w_order),
        (trees.krylov_trees, max(tableau.krylov_order, tableau.w_order)),
    ):
        assert _worst(row.b, row, order, family, trees.stage_weights_w) < EXACT
    assert (
        _residual(row.b, row, tableau.w_order + 1, trees.two_coloured, trees.stage_weights_w) > 1e-3
    )


def test_embedded_krylov_order():
    row = ROK4.row_form()
    assert _worst(row.b_hat, row, 3, trees.krylov_trees, trees.stage_weights_w) < EXACT


@pytest.mark.parametrize("tableau", named((RODAS4, RODAS5P)))
def test_order_for_index_one(tableau):
    """Order p in y; order p − 1 in z is enough, as z is not carried on from step to step."""
    row, order = tableau.row_form(), tableau.dae_order
    assert _worst(row.b, row, order, trees.differential) < EXACT
    assert _worst(row.b, row, order - 1, trees.algebraic) < EXACT
    assert _worst(row.b_hat, row, order - 1, trees.differential) < EXACT
    assert _worst(row.b_hat, row, order - 2, trees.algebraic) < EXACT
    for k in range(1, tableau.dense_order + 1):
        assert _dense_residual(tableau, row, k, trees.differential) < EXACT
    for k in range(1, tableau.dense_order):
        assert _dense_residual(tableau, row, k, trees.algebraic) < EXACT


def test_rosenbrock23_and_rok4_are_not_for_index_one():
    for tableau in (ROSENBROCK23, ROK4):
        row = tableau.row_form()
        assert tableau.dae_order == 0
        assert _residual(row.b, row, tableau.order, trees.algebraic) > 0.1


@pytest.mark.parametrize("tableau", named(ALL))
def test_every_coefficient_matters(tableau):
    """A wrong digit, the ninth of any coefficient, is seen by the conditions.

    They cannot see a multiple of e in the weights where ŷ₁ has the order asked for: the one entry
    of e of a stiffly accurate method (pinned in `test_stability`) and the last of each row of
    `dense`, which is as its author gives it."""
    missed = []
    for field in ("a", "c", "m", "e", "alpha_i", "gamma_i", "dense"):
        table = np.array(getattr(tableau, field))
        for place in zip(*np.nonzero(np.abs(table) > 1e-12), strict=True):
            free = field in ("e", "dense") and place[-1] == tableau.stages - 1
            if free and tableau.stiffly_accurate:
                continue
            wrong = table.copy()
            wrong[place] *= 1.0 + 1e-8
            rows = wrong.tolist()
            value = tuple(map(tuple, rows)) if wrong.ndim == 2 else tuple(rows)
            if _defect(dataclasses.replace(tableau, **{field: value})) < 1e2 * EXACT:
                missed.append((field, place))
    assert not missed


@pytest.mark.parametrize("tableau", named(ALL))
def test_stability(tableau):
    """L-stable: bounded by 1 on the imaginary axis (the pole is at 1/γ > 0), 0 at infinity."""
    row = tableau.row_form()
    axis = [abs(_stability(row, row.b, 1j * y)) for y in np.logspace(-3, 4, 200)]
    assert max(axis) < 1.0 + 1e-12
    assert abs(_stability_at_infinity(row, row.b)) < EXACT
    assert abs(_stability(row, row.b, -1e9)) < 1e-7
    stiffly = tableau in (RODAS4, RODAS5P)
    assert tableau.stiffly_accurate == stiffly
    if stiffly:
        assert tableau.e == (0.0,) * (tableau.stages - 1) + (1.0,)
        assert abs(_stability_at_infinity(row, row.b_hat)) < EXACT
        np.testing.assert_allclose(row.alpha[-1] + row.gamma[-1], row.b, atol=EXACT)
    if tableau is ROK4:  # |R̂(∞)| = 0.55, as the authors say
        np.testing.assert_allclose(_stability_at_infinity(row, row.b_hat), -0.5525, atol=1e-4)


@pytest.mark.parametrize("tableau", named(ALL))
def test_the_two_forms(tableau):
    row = tableau.row_form()
    again = from_row_form(
        tableau.name,
        alpha=tuple(map(tuple, row.alpha.tolist())),
        gamma=tuple(
            tuple(value if j < i else tableau.gamma * (i == j) for j, value in enumerate(line))
            for i, line in enumerate(row.gamma.tolist())
        ),
        b=tuple(row.b.tolist()),
        b_hat=tuple(row.b_hat.tolist()),
        order=tableau.order,
        embedded_order=tableau.embedded_order,
    )
    for field in ("a", "c", "m", "e", "alpha_i", "gamma_i"):
        np.testing.assert_allclose(
            getattr(again, field), getattr(tableau, field), rtol=1e-11, atol=1e-11, err_msg=field
        )
    assert isinstance(hash(tableau), int)


def test_rosenbrock23_is_the_formula_of_the_paper():
    """Shampine & Reichelt's k₁, k₂, k₃, error estimate and interpolant, written out."""
    problem: Any = steps.ring()
    t, h = 0.3, 0.07
    y, f = problem.y0, problem.f
    d, e32 = 1.0 / (2.0 + np.sqrt(2.0)), 6.0 + np.sqrt(2.0)
    w = np.eye(y.size) - h * d * problem.jacobian(t, y)
    slope = h * d * problem.time_derivative(t, y)
    f0 = f(t, y)
    k1 = np.linalg.solve(w, f0 + slope)
    f1 = f(t + h / 2, y + h / 2 * k1)
    k2 = np.linalg.solve(w, f1 - k1) + k1
    y1 = y + h * k2
    k3 = np.linalg.solve(w, f(t + h, y1) - e32 * (k2 - f1) - 2.0 * (k1 - f0) + slope)
    error = h / 6.0 * (k1 - 2.0 * k2 + k3)
    step = lambda weights: steps.rosenbrock_step(ROSENBROCK23, weights, problem, t, y, h)
    np.testing.assert_allclose(step(ROSENBROCK23.m), y1, rtol=1e-13)
    np.testing.assert_allclose(step(ROSENBROCK23.e) - y, -error, rtol=1e-9)
    s = 0.35
    inside = y + h * (s * (1 - s) / (1 - 2 * d) * k1 + s * (s - 2 * d) / (1 - 2 * d) * k2)
    weights = s ** np.arange(1, 3) @ ROSENBROCK23.dense_coefficients()
    np.testing.assert_allclose(step(weights), inside, rtol=1e-13)


@pytest.mark.parametrize("tableau", named(ALL))
def test_slope(tableau):
    m, e = np.array(tableau.m), np.array(tableau.e)
    for weights, order in ((m, tableau.order), (m - e, tableau.embedded_order)):
        step = ft.partial(steps.rosenbrock_step, tableau, weights)
        slope, _ = steps.order_of(step, steps.ring(), (32, 64))
        assert abs(slope - order) < 0.2


@pytest.mark.parametrize(("tableau", "counts"), [(RODAS4, (128, 256)), (RODAS5P, (32, 64))])
def test_slope_for_index_one(tableau, counts):
    step = ft.partial(steps.rosenbrock_step, tableau, tableau.m)
    _, slopes = steps.order_of(step, steps.index_one(), counts)
    assert np.all(np.abs(slopes - tableau.dae_order) < 0.2)


def test_slope_in_a_krylov_space():
    """Four Arnoldi steps of a problem with seven unknowns, time included; two are too few."""
    row, counts = ROK4.row_form(), (64, 128)
    slope = lambda size, b: steps.order_of(
        ft.partial(steps.krylov_step, ROK4, size, b), steps.ring(), counts
    )[0]
    assert abs(slope(4, row.b) - 4.0) < 0.2
    assert abs(slope(4, row.b_hat) - 3.0) < 0.2
    assert abs(slope(2, row.b) - 2.0) < 0.2
    y, h = steps.ring().y0, 0.1
    whole = steps.krylov_step(ROK4, 7, row.b, steps.ring(), 0.2, y, h)
    dense = steps.rosenbrock_step(ROK4, ROK4.m, steps.ring(), 0.2, y, h)
    np.testing.assert_allclose(whole, dense, rtol=1e-12)


def test_bad_tableaus_are_refused():
    with pytest.raises(ValueError, match="needs 4 entries"):
        dataclasses.replace(ROK4, gamma_i=(0.0,))
    with pytest.raises(ValueError, match="strictly lower"):
        dataclasses.replace(ROK4, c=tuple(map(tuple, np.eye(4).tolist())))
    with pytest.raises(ValueError, match="diagonal"):
        from_row_form(
            "uneven",
            alpha=((0.0, 0.0), (1.0, 0.0)),
            gamma=((1.0, 0.0), (0.0, 2.0)),
            b=(0.5, 0.5),
            b_hat=(1.0, 0.0),
            order=1,
            embedded_order=1,
        )
    with pytest.raises(ValueError, match="no interpolant"):
        ROK4.dense_coefficients()
    assert isinstance(ROK4, RosenbrockTableau)

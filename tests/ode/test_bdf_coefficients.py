"""NDF coefficients and differences: exact on polynomials, published gains and angles."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nksolve.ode.bdf import coefficients as bdf
from nksolve.ode.bdf.differences import advance, change_step, predict
from nksolve.ode.bdf.interpolation import BDFInterpolation

ORDERS = range(1, bdf.MAX_ORDER + 1)
ROWS = bdf.MAX_ORDER + 1
RNG = np.random.default_rng(3)


def _differences(values):
    """∇⁰, ∇¹, … at the first of values, which lie h apart, the newest first."""
    found, column = [], np.asarray(values, float)
    while column.size:
        found.append(column[0])
        column = column[:-1] - column[1:]
    return np.array(found)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("modified", [False, True])
def test_formula_on_polynomials(order, modified):
    """Exact to degree k; on tᵏ⁺¹ what is left is the error coefficient times hᵏ⁺¹(k + 1)!."""
    h, kappa = 0.3, bdf.NDF_KAPPA[order - 1] if modified else 0.0
    for degree in range(order + 2):
        poly = np.polynomial.Polynomial(RNG.standard_normal(degree + 1))
        d = _differences(poly(-h * np.arange(order + 3)))
        left = sum(d[m] / m for m in range(1, order + 1))
        left -= kappa * bdf.leading_coefficient(order) * d[order + 1] + h * poly.deriv()(0.0)
        wanted = 0.0
        if degree > order:
            top = h ** (order + 1) * math.factorial(order + 1) * poly.coef[-1]
            wanted = -bdf.error_coefficient(order, kappa) * top
        assert abs(left - wanted) < 1e-12


@pytest.mark.parametrize("order", ORDERS)
def test_step_in_terms_of_the_correction(order):
    """α_k d + Σ γ_m ∇ᵐy_{n−1} = h f is the formula: no polynomial needed, any values will do."""
    values, kappa = RNG.standard_normal(order + 2), bdf.NDF_KAPPA[order - 1]
    new, old = _differences(values), np.pad(_differences(values[1:]), (0, ROWS - order - 1))
    predicted = predict(jnp.asarray(old), jnp.asarray(order), jnp.asarray(1.0))
    d = values[0] - float(predicted.y)
    assert abs(d - new[order + 1]) < 1e-12
    formula = sum(new[m] / m for m in range(1, order + 1))
    formula -= kappa * bdf.leading_coefficient(order) * d
    alpha = bdf.newton_coefficient(order, kappa)
    assert abs(alpha * (d + float(predicted.psi)) - formula) < 1e-12
    found = advance(
        predicted.differences, jnp.asarray(d), jnp.asarray(order), jnp.asarray(values[0])
    )
    wanted = np.pad(new, (0, ROWS))[:ROWS]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_published_gains():
    """Shampine & Reichelt, table 1: steps longer by 26, 26, 26, 12 and 0 per cent."""
    gain = [
        (bdf.error_coefficient(k) / bdf.error_coefficient(k, bdf.NDF_KAPPA[k - 1])) ** (1 / (k + 1))
        for k in ORDERS
    ]
    assert [round(100 * (g - 1)) for g in gain] == [26, 26, 26, 12, 0]


@pytest.mark.parametrize(
    ("kappas", "angles"),
    [((0.0,) * 5, (90, 90, 86, 73, 51)), (bdf.NDF_KAPPA, (90, 90, 80, 66, 51))],
    ids=["BDF", "NDF"],
)
def test_published_angles(kappas, angles):
    """A(α)-stability from the root locus, in degrees as table 1 prints them."""
    w = np.exp(1j * np.linspace(1e-3, np.pi, 20001))
    for order, kappa, angle in zip(ORDERS, kappas, angles, strict=True):
        locus = sum((1 - w) ** m / m for m in range(1, order + 1))
        locus = locus - kappa * bdf.leading_coefficient(order) * (1 - w) ** (order + 1)
        left = locus[locus.real < -1e-9]
        found = np.degrees(np.min(np.pi - np.abs(np.angle(left)))) if left.size else 90.0
        assert abs(found - angle) <= 1.0


def test_change_of_step():
    change = jax.jit(change_step)
    for order in ORDERS:
        for ratio in (0.3, 1.0, 1.7):
            h, poly = 0.4, np.polynomial.Polynomial(RNG.standard_normal(order + 1))
            before = _differences(poly(-h * np.arange(order + 1)))
            after = _differences(poly(-ratio * h * np.arange(order + 1)))
            matrix = np.asarray(change(jnp.asarray(order), jnp.asarray(ratio)))
            inside = matrix[: order + 1, : order + 1]
            np.testing.assert_allclose(inside @ before, after, atol=1e-11)
            np.testing.assert_array_equal(matrix[order + 1 :], np.eye(ROWS)[order + 1 :])
            if ratio == 1.0:
                np.testing.assert_array_equal(matrix, np.eye(ROWS))
            t0, t1 = 1.0 - h, 1.0
            rows = jnp.asarray(np.pad(before, (0, ROWS - order - 1)))
            path = BDFInterpolation(jnp.asarray(t0), jnp.asarray(t1), rows)
            for t in (0.6, 0.75, 1.0, 1.1):
                np.testing.assert_allclose(path.evaluate(t), poly(t - t1), atol=1e-12)
            np.testing.assert_allclose(
                path.evaluate(0.7, 0.9), poly(0.9 - t1) - poly(0.7 - t1), atol=1e-12
            )


def test_bad_orders_are_refused():
    for call in (bdf.newton_coefficient, bdf.error_coefficient):
        for order in (0, 6):
            with pytest.raises(ValueError, match="orders 1 to 5"):
                call(order)

"""The 23 problems: the right answers from the standard starts, and the formulas against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from nksolve.problems import NONLINEAR_LIBRARY, get, watson_terms

from .oracle import dense, newton, residual

NEWTON_REACHES_THE_ROOT = [
    "powell-badly-scaled",
    "helical-valley",
    "chebyquad",
    "variably-dimensioned",
    "hammarling-2",
    "hammarling-3",
    "dennis-schnabel",
    "freudenstein-roth",
]
ANOTHER_ROOT = {"wood": (-1.0, 1.0, -1.0, 1.0), "boggs": (-1.0, 2.0), "double-root": (0.0,)}


@pytest.mark.parametrize("name", NEWTON_REACHES_THE_ROOT)
def test_newton_reaches_the_root(name):
    problem = get(name)
    y, _ = newton(problem, atol=1e-12, max_steps=60)
    np.testing.assert_allclose(y, problem.root, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ANOTHER_ROOT)
def test_newton_reaches_another_root(name):
    y, _ = newton(get(name), atol=1e-12)
    np.testing.assert_allclose(y, ANOTHER_ROOT[name], atol=0.06)


@pytest.mark.parametrize(("name", "rate"), [("powell-singular", 0.5), ("sample-19", 2 / 3)])
def test_newton_is_linear_at_a_singular_root(name, rate):
    problem = get(name)
    _, norms = newton(problem, atol=1e-11)
    degree = 2 if name == "powell-singular" else 3
    np.testing.assert_allclose(norms[-1] / norms[-2], rate**degree, rtol=1e-3)


def test_brown_almost_linear_has_the_root_alpha():
    problem = get("brown-almost-linear", n=10)
    alphas = np.roots([10.0, -11.0, *np.zeros(8), 1.0])
    alpha = next(a.real for a in alphas if abs(a.imag) < 1e-9 and 0 < a.real < 0.999)
    y = np.full(10, alpha)
    y[-1] = alpha**-9
    np.testing.assert_allclose(residual(problem, y), 0.0, atol=1e-12)


def test_generalised_rosenbrock_cascades():
    problem = get("generalised-rosenbrock", n=6)
    y, norms = newton(problem, atol=1e-10)
    np.testing.assert_allclose(y, 1.0, atol=1e-10)
    assert max(norms) > 1e10 * norms[0]


@pytest.mark.parametrize("n", [6, 9])
def test_watson_minimum(n):
    problem = get("watson", n=n)
    y, _ = newton(problem, atol=1e-9)
    minimum = np.sum(np.asarray(watson_terms(jnp.asarray(y))) ** 2)
    np.testing.assert_allclose(minimum, problem.published["sum_of_squares"], rtol=3e-6)


def test_watson_is_half_a_gradient():
    problem = get("watson", n=6)
    x = jax.random.normal(jax.random.key(0), (6,))
    gradient = jax.grad(lambda x: (watson_terms(x) ** 2).sum())(x)
    np.testing.assert_allclose(2.0 * problem.fn(x, None), gradient, rtol=1e-10)


def test_chebyquad_roots_are_symmetric_for_six_points():
    problem = get("chebyquad", n=6)
    found = scipy.optimize.root(lambda x: residual(problem, x), problem.y0, tol=1e-13)
    assert found.success
    x = np.sort(found.x)
    np.testing.assert_allclose(x, -x[::-1], atol=1e-9)
    # Fletcher's points on [0, 1]: the first is 0.066877.
    np.testing.assert_allclose((1.0 + x[0]) / 2.0, 0.066877, atol=5e-7)


def test_boundary_value_and_integral_equation_have_the_same_root():
    first, _ = newton(get("discrete-boundary-value", n=15), atol=1e-12)
    second, _ = newton(get("discrete-integral-equation", n=15), atol=1e-12)
    np.testing.assert_allclose(first, second, atol=1e-11)


def test_boundary_value_is_of_second_order():
    errors = []
    for n in (9, 19):
        problem = get("discrete-boundary-value", n=n)
        y, _ = newton(problem, atol=1e-12)
        errors.append(np.max(np.abs(y - problem.continuum)))
    assert 3.6 < errors[0] / errors[1] < 4.4


def test_trigonometric_local_minimum():
    problem = get("trigonometric")
    found = scipy.optimize.least_squares(
        lambda x: residual(problem, x),
        problem.y0,
        jac=lambda x: dense(problem, x)[1],
        method="lm",
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-14,
    )
    np.testing.assert_allclose(2.0 * found.cost, problem.published["local_minimum"], rtol=1e-5)


def test_freudenstein_roth_traps_descent():
    problem = get("freudenstein-roth")
    found = scipy.optimize.least_squares(lambda x: residual(problem, x), problem.y0)
    np.testing.assert_allclose(2.0 * found.cost, 48.9842, rtol=1e-5)


def test_sample_18_is_continuous_on_the_axes():
    problem = get("sample-18")
    for point in ([0.0, 0.0], [0.0, 2.0], [2.0, 0.0]):
        point = np.asarray(point)
        near = residual(problem, point + 1e-9)
        np.testing.assert_allclose(residual(problem, point), near, atol=1e-7)
        slope = dense(problem, point)[1]
        np.testing.assert_allclose(slope, dense(problem, point + 1e-9)[1], atol=1e-7)


def test_helical_valley_angle_in_all_quadrants():
    problem = get("helical-valley")
    for x1, x2, theta in [
        (1, 1, 0.125),
        (-1, 1, 0.375),
        (-1, -1, 0.625),
        (1, -1, -0.125),
        (0, 1, 0.25),
    ]:
        f = residual(problem, np.asarray([x1, x2, 0.0]))
        np.testing.assert_allclose(f[0], -100.0 * theta, rtol=1e-14)


def loop_tridiagonal(x):
    n, p = len(x), np.concatenate([[0.0], x, [0.0]])
    return [(3 - 2 * p[i]) * p[i] - p[i - 1] - 2 * p[i + 1] + 1 for i in range(1, n + 1)]


def loop_banded(x):
    n = len(x)
    near = [[j for j in range(max(0, i - 5), min(n, i + 2)) if j != i] for i in range(n)]
    return [
        x[i] * (2 + 5 * x[i] ** 2) + 1 - sum(x[j] * (1 + x[j]) for j in near[i]) for i in range(n)
    ]


@pytest.mark.parametrize("n", [1, 3, 10])
@pytest.mark.parametrize(
    ("name", "loop"), [("broyden-tridiagonal", loop_tridiagonal), ("broyden-banded", loop_banded)]
)
def test_broyden_against_loops(name, loop, n):
    problem = get(name, n=n)
    x = np.random.default_rng(0).normal(size=n)
    np.testing.assert_allclose(residual(problem, x), loop(x), rtol=1e-13)
    y, _ = newton(problem, atol=1e-12)
    assert np.all(y < 0)


def test_every_problem_of_the_library_is_tested_by_value():
    """A root, a continuum or a published number: only these three have none."""
    bare = {
        name
        for name in NONLINEAR_LIBRARY
        if (p := get(name)).root is None and p.continuum is None and not p.published
    }
    assert bare == {"broyden-tridiagonal", "broyden-banded", "watson"}

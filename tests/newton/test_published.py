"""Published histories and solutions, reached with at most the published work."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import nksolve as nks
from nksolve.problems import get

from .solving import all_finite, counters, max_norm, reason, rows, run


def solve(problem, solver, **kwargs):
    return run(problem.fn, solver, problem.y0, problem.args, **kwargs)


def kelley(forcing):
    return nks.NewtonKrylov(1e-10, 1e-10, forcing=forcing, history_length=10)


@pytest.mark.parametrize(
    ("forcing", "same_steps"),
    [
        (nks.ConstantForcing(0.1), True),
        (nks.EisenstatWalker2(eta_0=0.9), True),  # as he starts: at η_max
        (nks.EisenstatWalker2(), False),
    ],
    ids=["constant", "ew2-kelley", "ew2-default"],
)
def test_chandrasekhar(forcing, same_steps):
    """Kelley, SIAMFANLEquations: n = 512, c = ½, rtol = atol = 1e-10; η = 0.1 and Eisenstat–Walker
    with γ = η_max = 0.9 have the same history."""
    problem = get("chandrasekhar")
    published = np.asarray(problem.published["fixed_eta_history"])
    solution = solve(problem, kelley(forcing))
    record, counted = rows(solution), counters(solution)
    norms = record["norm"]
    assert reason(solution) in ("residual_atol", "residual_rtol")
    assert counted["num_steps"] <= len(published) - 1
    assert counted["num_rejected_steps"] == 0
    # The default stops earlier, at a looser last residual that meets the test.
    assert np.all(norms <= np.maximum(1.1 * published[: len(norms)], 1e-10 * (1 + norms[0])))
    if same_steps:
        # His differences cost the last digit.
        np.testing.assert_allclose(norms[:-1], published[:-1], rtol=1e-5)
        np.testing.assert_allclose(norms[-1], published[-1], rtol=1e-2)
        assert list(record["num_matvecs"]) == [1, 1, 1, 1, 2, 0]
    assert counted["num_matvecs"] <= 6
    np.testing.assert_allclose(np.mean(solution.value), problem.published["mean"], rtol=1e-9)


NEWTON = nks.NewtonKrylov(
    0.0, 1e-5, norm=max_norm, forcing=nks.ConstantForcing(1e-10), history_length=20
)


@pytest.mark.parametrize(("start", "steps"), [("lower", 3), ("middle", 5)])
def test_ferraris_tronconi(start, steps):
    """SUNDIALS, kinFerTron_dns: both roots, in 3 and 5 exact Newton steps."""
    problem = get("ferraris-tronconi", start=start)
    solution = solve(problem, NEWTON)
    assert problem.published["newton_steps"] == steps
    assert counters(solution)["num_steps"] <= steps
    assert counters(solution)["num_rejected_steps"] == 0
    assert float(max_norm(problem.fn(solution.value, None))) <= 1e-5
    # Six digits are printed.
    np.testing.assert_allclose(solution.value, problem.published["solution"], rtol=2e-6)


@pytest.mark.parametrize(
    ("forcing", "name"),
    [(1e-10, "newton_history"), (0.1, "gmres_history")],
    ids=["newton", "gmres"],
)
def test_simple_2d(forcing, name):
    """Kelley's 2 × 2 system; two GMRES iterations solve it exactly, one is not enough for 0.1."""
    problem = get("simple-2d")
    solver = nks.NewtonKrylov(
        0.0,
        1e-9,
        forcing=nks.ConstantForcing(forcing),
        globalisation=nks.Parabolic(),
        history_length=12,
    )
    solution = solve(problem, solver)
    record = rows(solution)
    norms = record["norm"][record["accepted"]]
    published = np.asarray(problem.published[name])
    assert len(norms) <= len(published)
    np.testing.assert_allclose(norms[:4], published[:4], rtol=1e-3)
    assert norms[-1] <= 1.1 * published[-1]
    # The first step is halved, and only that.
    np.testing.assert_array_equal(record["step_length"], [0, 1, 0.5, 1, 1, 1])
    np.testing.assert_allclose(solution.value, problem.root, atol=1e-9)


def test_laplace():
    """SUNDIALS, kinLaplace: 0.15564 at the centre, 0.00405 in the corner."""
    problem = get("laplace")
    linear_solver = nks.GMRES(restart=60)
    solver = nks.NewtonKrylov(0.0, 1e-9, norm=max_norm, linear_solver=linear_solver)
    solution = solve(problem, solver)
    assert reason(solution) == "residual_atol"
    assert counters(solution)["num_steps"] <= 5  # of exact Newton; KINSOL's modified one takes 7
    assert f"{float(solution.value[15, 15]):.5f}" in ("0.15564", "0.15565")
    np.testing.assert_allclose(solution.value[15, 15], problem.published["centre"], atol=1e-5)
    np.testing.assert_allclose(solution.value[0, 0], problem.published["corner"], atol=5e-6)


def test_food_web():
    """SUNDIALS, kinFoodWeb_kry, 8 × 8: every printed digit of the equilibrium, with fewer Newton
    steps and products than its 9 and 338, and without its block-diagonal preconditioner."""
    problem = get("food-web")
    linear_solver = nks.GMRES(restart=60)
    solver = nks.NewtonKrylov(0.0, 1e-7, norm=max_norm, linear_solver=linear_solver)
    solution = solve(problem, solver)
    counted, published = counters(solution), problem.published
    assert reason(solution) == "residual_atol"
    assert counted["num_steps"] <= 5 < published["newton_steps"]
    assert counted["num_matvecs"] <= 200 < published["jacobian_products"]
    concentrations = np.asarray(solution.value / problem.args.scale[None, None, :])
    for corner, name in (((0, 0), "bottom_left"), ((-1, -1), "top_right")):
        prey, predator = published[name]
        for species in range(3):
            np.testing.assert_allclose(concentrations[corner][species], prey, atol=0.6e-5)
            np.testing.assert_allclose(concentrations[corner][3 + species], predator, atol=0.06)


def test_bratu_agrees_with_scipy():
    problem = get("bratu", n=16)
    solution = solve(problem, nks.NewtonKrylov(0.0, 1e-12, linear_solver=nks.GMRES(restart=40)))

    def residual(u):
        return np.asarray(problem.fn(jnp.asarray(u), problem.args))

    expected = scipy.optimize.newton_krylov(residual, np.zeros((16, 16)), f_tol=1e-11)
    assert reason(solution) == "residual_atol"
    np.testing.assert_allclose(solution.value, expected, atol=1e-8)
    assert float(jnp.max(solution.value)) < 1.5  # the lower branch


def test_convection_diffusion():
    """Kelley, n = 31: exact Newton with full steps, ‖F‖ 412.45, 603.20, 134.42, 4.0358, 3.09e-3."""
    problem = get("convection-diffusion")
    solver = nks.NewtonKrylov(
        1e-7,
        1e-10,
        forcing=nks.ConstantForcing(1e-5),
        globalisation=nks.FullStep(),
        linear_solver=nks.GMRES(restart=150),
        history_length=8,
    )
    solution = solve(problem, solver)
    norms = rows(solution)["norm"]
    np.testing.assert_allclose(norms[0], problem.published["start_norm"], rtol=1e-7)
    np.testing.assert_allclose(norms[:4], problem.published["newton_history"][:4], rtol=2e-4)
    assert reason(solution) in ("residual_atol", "residual_rtol")
    assert counters(solution)["num_steps"] <= 5
    error = float(max_norm(solution.value - problem.continuum))
    np.testing.assert_allclose(error, problem.published["discretisation_error"], rtol=1e-2)


def _cubic(y, scale):
    return scale * (y**3 + jnp.flip(y) - 3)


def test_float32_is_free_of_scale():
    """atol = 0: residuals times 1e-8 … 1e8 take the same steps, trials and matvecs."""
    solver = nks.NewtonKrylov(1e-5, 0.0)
    y0 = jnp.asarray([4.0, -3.0, 0.1, 7.0], jnp.float32)
    seen = set()
    for exponent in range(-8, 9, 2):
        scale = jnp.asarray(10.0**exponent, jnp.float32)
        solution = run(_cubic, solver, y0, scale)
        assert solution.value.dtype == jnp.float32 and all_finite(solution.value)
        assert reason(solution) == "residual_rtol"
        seen.add(tuple(sorted(counters(solution).items())))
    assert len(seen) == 1
    assert dict(seen.pop())["num_rejected_steps"] > 0  # or the line search is not tried

"""Diurnal kinetics with transport: the equations, CVODE's printed output, and BDF's counters."""

import functools as ft

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate as spi

import nksolve as nks
from nksolve.ode import BDF, BDFController, SimplifiedNewton, WithStats
from nksolve.problems.diurnal import diurnal

HOURS = np.arange(2, 26, 2)

# Both species bottom left, in the middle and top right, every two hours, as the output that comes
# with CVODE's example prints them. Below 1e-4 nothing of it is more than rounding: it is set to 0.
PRINTED = np.array(
    [
        [1.047e04, 2.964e04, 1.119e04, 2.527e11, 7.154e11, 2.700e11],
        [6.659e06, 5.316e06, 7.301e06, 2.582e11, 2.057e11, 2.833e11],
        [2.665e07, 1.036e07, 2.931e07, 2.993e11, 1.028e11, 3.313e11],
        [8.702e06, 1.292e07, 9.650e06, 3.380e11, 5.029e11, 3.751e11],
        [1.404e04, 2.029e04, 1.561e04, 3.387e11, 4.894e11, 3.765e11],
        [0.0, 0.0, 0.0, 3.382e11, 1.355e11, 3.804e11],
        [0.0, 0.0, 0.0, 3.358e11, 4.930e11, 3.864e11],
        [0.0, 0.0, 0.0, 3.320e11, 9.650e11, 3.909e11],
        [0.0, 0.0, 0.0, 3.313e11, 8.922e11, 3.963e11],
        [0.0, 0.0, 0.0, 3.330e11, 6.186e11, 4.039e11],
        [0.0, 0.0, 0.0, 3.334e11, 6.669e11, 4.120e11],
        [0.0, 0.0, 0.0, 3.352e11, 9.107e11, 4.163e11],
    ]
)
CVODE = dict(num_steps=492, num_newton_steps=634, num_matvecs=649, num_error_failures=32)


def _sampled(c):
    c = np.asarray(c)
    return np.concatenate([c[..., i, i, :][..., None, :] for i in (0, 4, 9)], axis=-2)


@ft.cache
def _problem():
    return diurnal()


@ft.cache
def _ours(kappa):
    problem = _problem()
    solver = BDF(
        nks.GMRES(preconditioner=nks.BlockJacobi(coupling=nks.Star())),
        SimplifiedNewton(kappa=kappa, max_steps=4),
    )

    @jax.jit
    def run(rtol):
        return dfx.diffeqsolve(
            dfx.ODETerm(problem.fn),
            solver,
            *problem.span,
            None,
            problem.y0,
            problem.args,
            stepsize_controller=BDFController(rtol, problem.atol_factor * rtol),
            saveat=dfx.SaveAt(ts=3600.0 * HOURS),
            adjoint=WithStats(dfx.ForwardMode()),
            max_steps=2000,
        )

    return run


def _error(y, rtol):
    problem = _problem()
    assert problem.end is not None
    allowed = rtol * (problem.atol_factor + np.abs(problem.end))
    return np.max(np.abs(np.asarray(y) - problem.end) / allowed)


def _with_loops(t, c):
    """The equations as they are printed, entry by entry."""
    n = len(c)
    d = 20.0 / (n - 1)
    sine = np.sin(np.pi * t / 43200.0)
    q3, q4 = (np.exp(-a / sine) if sine > 0 else 0.0 for a in (22.62, 7.601))
    k_v = lambda height: 1e-8 * np.exp(height / 5.0)
    inside = lambda i: 1 if i < 0 else (n - 2 if i == n else i)
    out = np.zeros_like(c)
    for j in range(n):
        for i in range(n):
            here, right, left = c[j, i], c[j, inside(i + 1)], c[j, inside(i - 1)]
            above, below = c[inside(j + 1), i], c[inside(j - 1), i]
            height = 30.0 + d * j
            flux = k_v(height + d / 2) * (above - here) - k_v(height - d / 2) * (here - below)
            transport = 4e-6 * (right - 2 * here + left) / d**2 + 1e-3 * (right - left) / (2 * d)
            a, b = here
            gained = 1.63e-16 * 3.7e16 * a
            met = 4.66e-16 * a * b
            reaction = [
                -gained - met + 2 * q3 * 3.7e16 + q4 * b,
                gained - met - q4 * b,
            ]
            out[j, i] = transport + flux / d**2 + reaction
    return out


def test_the_equations():
    problem = _problem()
    rng = np.random.default_rng(0)
    c = np.asarray(problem.y0) * rng.uniform(0.5, 1.5, (10, 10, 2))
    for t in (0.0, 9000.0, 21600.0, 60000.0):
        wanted = _with_loops(t, c)
        found = np.asarray(jax.jit(problem.fn)(t, jnp.asarray(c), problem.args))
        size = np.abs(wanted).max(axis=(0, 1))
        np.testing.assert_allclose(found / size, wanted / size, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="n must be at least 2"):
        diurnal(1)
    assert diurnal(4).end is None and diurnal(4).y0.shape == (4, 4, 2)


def test_finite_derivatives_at_night_and_at_sunrise():
    problem = _problem()
    for t in (0.0, 43200.0, 50000.0):
        slope = jax.jit(jax.jacfwd(lambda t, args: problem.fn(t, problem.y0, args), (0, 1)))
        for leaf in jax.tree.leaves(slope(t, problem.args)):
            assert np.all(np.isfinite(leaf))


@ft.cache
def _scipy(rtol):
    problem = _problem()
    shape = problem.y0.shape
    flat = jax.jit(lambda t, y: problem.fn(t, y.reshape(shape), problem.args).ravel())
    jacobian = jax.jit(jax.jacfwd(flat, argnums=1))
    out = spi.solve_ivp(
        lambda t, y: np.asarray(flat(t, y)),
        problem.span,
        np.asarray(problem.y0).ravel(),
        method="BDF",
        rtol=rtol,
        atol=problem.atol_factor * rtol,
        jac=lambda t, y: np.asarray(jacobian(t, y)),
    )
    return out.y[:, -1].reshape(shape)


def test_the_end_value_and_cvodes_printed_output():
    assert _error(_scipy(1e-8), 1e-5) < 0.5
    sol = _ours(0.1)(1e-6)
    found = _sampled(sol.ys)
    printed = np.moveaxis(PRINTED.reshape(12, 2, 3), 1, 2)
    # Four digits were printed, of a solution with rtol = 1e-5.
    np.testing.assert_allclose(found, printed, rtol=1e-3, atol=1.0)
    np.testing.assert_allclose(_sampled(_problem().end), printed[-1], rtol=2e-4, atol=1e-3)


def test_counters_and_accuracy_beside_cvodes_and_scipys():
    sol = _ours(0.1)(1e-5)
    stats = {name: int(count) for name, count in sol.stats.items()}
    steps = stats["num_accepted_steps"]
    assert steps <= 1.1 * CVODE["num_steps"]
    assert stats["num_rejected_steps"] <= 1.2 * CVODE["num_error_failures"]
    assert stats["num_newton_steps"] <= 1.2 * steps
    assert stats["num_newton_steps"] < CVODE["num_newton_steps"]
    assert stats["num_matvecs"] <= 2.0 * steps
    assert 10 * stats["num_preconditioner_updates"] <= steps
    # The linearisation of a step has f at its first iterate.
    assert stats["num_fn_evals"] <= 1.2 * steps
    assert stats["num_linearisations"] == steps + stats["num_rejected_steps"]
    assert stats["num_convergence_failures"] == 0
    assert _error(sol.ys[-1], 1e-5) <= 2 * _error(_scipy(1e-5), 1e-5)


@pytest.mark.slow
def test_counters_with_the_default_kappa():
    sol = _ours(0.01)(1e-5)
    steps = int(sol.stats["num_accepted_steps"])
    assert int(sol.stats["num_newton_steps"]) <= 1.2 * steps
    assert int(sol.stats["num_matvecs"]) <= 2.3 * steps
    assert 10 * int(sol.stats["num_preconditioner_updates"]) <= steps
    assert _error(sol.ys[-1], 1e-5) <= 2 * _error(_scipy(1e-5), 1e-5)

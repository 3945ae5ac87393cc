"""Numbers at the ends of the range, points at infinity, tolerances and norms that are none, and
unknowns of every kind: nothing that is rounded to zero or compared with NaN is taken for a root."""

import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks

from .catalogue import SOLVERS, Wanted
from .solving import SUCCESS, all_finite, counters, max_norm, reason, run, two_norm
from .test_bad_residuals import MAIN, scaled_norm, watched

F32 = jnp.float32


def made(name, rtol, atol, y0):
    """A solver with traced tolerances: one program for all of them."""
    real = jnp.finfo(y0.dtype).dtype
    tolerances = (jnp.asarray(t, real) for t in (rtol, atol))
    return SOLVERS[name](Wanted(*tolerances, y0, 201, max(y0.size, 1)))


def each(*names):
    return pytest.mark.parametrize("name", names)


# --- residuals and Jacobians of any size ---------------------------------------------------------


def _sized(y, size):
    """F and y of that size; J near A."""
    matrix = jnp.asarray([[2.0, 1.0], [0.3, 3.0]], y.dtype)
    return matrix @ y - size + 0.1 * size * jnp.tanh(y / size)


@pytest.mark.parametrize("size", [1e30, 1e20, 1e-20, 1e-30])
@each("FullStep", "Backtracking", "Dogleg", "LevenbergMarquardt", "Robust", "Scaled", "Broyden")
def test_squares_out_of_range(name, size):
    """‖F‖₂ is finite where F is, and not zero where F is not, in float32."""
    size, y0 = jnp.asarray(size, F32), jnp.zeros(2, F32)
    found = run(_sized, made(name, 1e-4, 0.0, y0), y0, size, max_steps=100)
    assert reason(found) == "residual_rtol"
    assert np.linalg.norm(np.asarray(_sized(found.value, size)) / size) <= 1e-3
    never = run(_sized, made(name, 0.0, 0.0, y0), y0, size, max_steps=100)
    at_root = not np.any(_sized(never.value, size))
    assert (reason(never) in SUCCESS) == at_root == (float(never.stats["residual_norm"]) == 0)


def _steep(y, size):
    """J of that size."""
    return size * (y - 1.0 + 0.1 * y**2)


@pytest.mark.parametrize("size", [1e30, 1e-30])
@each("Backtracking", "Dogleg", "LevenbergMarquardt", "Robust")
def test_jacobians_out_of_range(name, size):
    """Krylov methods square ‖J v‖. Where that is out of range they fail, and say so; in typical
    sizes it is not."""
    size, y0 = jnp.asarray(size, F32), jnp.asarray([3.0, -2.0], F32)
    found = run(_steep, made(name, 1e-5, 0.0, y0), y0, size, max_steps=100)
    assert reason(found) in ("linear_solve_failed", "step_small", "nonfinite")
    np.testing.assert_array_equal(found.value, y0)
    scaled = run(_steep, nks.Scaled(made(name, 1e-5, 0.0, y0)), y0, size, max_steps=100)
    assert reason(scaled) == "residual_rtol"
    np.testing.assert_allclose(scaled.value, 5 * (1.4**0.5 - 1), rtol=1e-3)


def _exponential(y, _):
    """Infinite beyond 2.96 in float32."""
    return jnp.exp(30.0 * y) - 1.0


OVERFLOW = {
    "FullStep": "nonfinite",
    "Backtracking": "line_search_failed",
    "Dogleg": "trust_region_failed",
    "PseudoTransient": "residual_atol",
    "Robust": "residual_rtol",
}


@each(*OVERFLOW)
def test_overflow(name):
    y0 = jnp.asarray([-1.0, -0.5], F32)
    found, seen = watched(_exponential, made(name, 1e-5, 0.0, y0), y0, max_steps=200)
    assert reason(found) == OVERFLOW[name]
    norms = [two_norm(f) for _, f in seen if all_finite(f)]
    np.testing.assert_allclose(found.stats["residual_norm"], min(norms), rtol=1e-6)


def _cliff(y, _):
    """From 1e-30 to 1e30, whose ratio no float32 holds, by a full step from 2e-30."""
    return jnp.where(y < 1.5e-30, 1e30, y - 1e-30)


@each("FullStep", "Backtracking", "Robust")
def test_ratio_of_norms_out_of_range(name):
    """A finite residual is no infinite one."""
    y0 = jnp.full(2, 2e-30, F32)
    found = run(_cliff, made(name, 1e-4, 0.0, y0), y0, max_steps=200)
    why = reason(found)
    assert why == "diverged" if name == "FullStep" else why not in (*SUCCESS, "nonfinite")
    assert 0 < float(found.stats["residual_norm"]) <= two_norm(_cliff(y0, None))


# --- points at infinity --------------------------------------------------------------------------


def _reciprocal(y, _):
    return 1.0 / y


@each(*MAIN)
def test_infinity_is_no_root(name):
    """F falls for as far as numbers reach, and is zero beyond."""
    y0 = jnp.ones(2, F32)
    found = run(_reciprocal, made(name, 0.0, 0.0, y0), y0, max_steps=200)
    assert reason(found) not in SUCCESS
    assert all_finite(found.value)
    assert float(found.stats["residual_norm"]) == pytest.approx(two_norm(1 / found.value), rel=1e-6)


def _at_the_edge(y, _):
    """Zero at infinity, with a Jacobian that leads there."""
    beyond = jnp.isinf(y)
    nothing = jnp.where(beyond, 0.0, y - lax.stop_gradient(y))
    return jnp.where(beyond, 0.0, 1e250) - 1e-55 * nothing


@each("FullStep", "Damped", "Backtracking", "NLEQErr", "Picard")
def test_no_step_to_infinity(name):
    y0 = jnp.full(2, 1.7976e308)
    solver = made(name, 1e-8, 0.0, y0)
    found = run(_at_the_edge, solver, y0, max_steps=100)
    assert reason(found) not in SUCCESS
    assert all_finite(found.value)


# --- tolerances and norms ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [(-1e-3, 0.0), (0.0, -1.0), (float("nan"), 0.0)])
@each(*SOLVERS)
def test_tolerances_that_are_none(name, bad):
    with pytest.raises(ValueError, match="must not be negative"):
        SOLVERS[name](Wanted(*bad, jnp.ones(2), 11, 2))


def _tame(y, a):
    return y**3 + y - a


@each("Backtracking", "Dogleg", "NLEQErr", "Robust", "Scaled", "Broyden", "RightPreconditioned")
def test_traced_tolerances_that_are_none(name):
    """‖F‖ is not below NaN, nor below −1: no success but ‖F‖ ≤ atol, and the best all the same."""
    root, a = jnp.asarray([1.0, 2.0]), jnp.asarray([2.0, 10.0])
    for rtol, atol in ((jnp.nan, 0.0), (0.0, jnp.nan), (jnp.nan, jnp.nan), (0.0, -1.0)):
        for y0 in (jnp.asarray([3.0, -1.0]), root):
            found = run(_tame, made(name, rtol, atol, y0), y0, a, max_steps=200)
            norm = float(found.stats["residual_norm"])
            assert (reason(found) in SUCCESS) == (norm <= atol)
            np.testing.assert_allclose(found.value, root, rtol=1e-7)


def test_one_tolerance_that_is_none():
    """‖F‖ ≤ atol holds whatever rtol is."""
    y0, a = jnp.asarray([3.0, -1.0]), jnp.asarray([2.0, 10.0])
    found = run(_tame, made("Backtracking", jnp.nan, 1e-9, y0), y0, a, max_steps=200)
    assert reason(found) == "residual_atol"


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("kind", [nks.NewtonKrylov, nks.Robust, nks.Broyden])
def test_norms_that_are_none(kind, bad):
    """Not comparable with any tolerance."""
    solver = kind(1e-8, 1e-8, norm=lambda f: jnp.sum(f) * 0.0 + bad)
    found = run(_tame, solver, jnp.ones(2), jnp.ones(2), max_steps=200)
    assert reason(found) == "nonfinite"
    np.testing.assert_array_equal(found.value, 1.0)


def test_a_norm_that_turns_to_nan():
    """At the second point: it is passed over, and what was seen before is returned."""
    norm = lambda f: jnp.where(max_norm(f) < 1.0, jnp.nan, max_norm(f))
    solver = nks.NewtonKrylov(1e-8, 0.0, norm=norm, globalisation=nks.FullStep())
    found = run(lambda y, _: y - 1.0, solver, jnp.full(2, 4.0), max_steps=20)
    assert reason(found) == "nonfinite"
    assert float(found.stats["residual_norm"]) == 3.0
    np.testing.assert_array_equal(found.value, 4.0)


def test_a_preconditioned_start_that_is_not_finite():
    """N may lead from where F is infinite to where it is not: tolerances are relative to that."""

    def fn(y, _):
        return jnp.where(y > 5.0, jnp.inf, y**2 - 4.0)

    inner = nks.NonlinearPreconditioner(nks.Picard(0.0, 0.0), fn=lambda y, _: 3.0 + 0.0 * y - y)
    solver = nks.RightPreconditioned(nks.NewtonKrylov(1e-6, 0.0), inner)
    found = run(fn, solver, jnp.full(2, 9.0), max_steps=30)
    assert reason(found) == "residual_rtol"
    np.testing.assert_allclose(found.stats["initial_residual_norm"], 5.0 * 2**0.5)
    assert two_norm(fn(found.value, None)) <= 1e-6 * 5.0 * 2**0.5


# --- unknowns ------------------------------------------------------------------------------------


@each(*MAIN)
def test_one_unknown_and_none(name):
    """`_tame` of a vector of one, and of none: a root before the first step."""
    one = jnp.asarray([3.0])
    found = run(_tame, made(name, 1e-8, 0.0, one), one, jnp.asarray([2.0]), max_steps=200)
    assert reason(found) in SUCCESS
    np.testing.assert_allclose(found.value, 1.0, rtol=1e-7)
    nothing = jnp.zeros(0)
    found = run(_tame, made(name, 0.0, 0.0, nothing), nothing, nothing, max_steps=5)
    assert reason(found) == "residual_atol"
    assert counters(found)["num_steps"] == 0 and found.value.shape == (0,)


def _complex(y, kind):
    """No root in ℂ, one, and NaN on the way to it."""
    beyond = jnp.where(jnp.abs(y) > 3.0, jnp.nan, y**2 + 1.0)
    return lax.switch(kind, [lambda: y * y.conj() + 1.0, lambda: y**2 + 1.0, lambda: beyond])


#: Without a root, with one, and with one behind NaN.
COMPLEX = {
    "Backtracking": ("max_steps", "residual_rtol", "residual_rtol"),
    "Dogleg": ("trust_region_failed", "residual_rtol", "residual_rtol"),
    "LevenbergMarquardt": ("trust_region_failed", "residual_rtol", "residual_rtol"),
    "Robust": ("max_steps", "residual_rtol", "residual_rtol"),
    "Scaled": ("line_search_failed", "residual_rtol", "residual_rtol"),
    "Broyden": ("stagnated", "stagnated", "residual_rtol"),
}


@each(*COMPLEX)
def test_complex_unknowns(name):
    y0 = jnp.asarray([0.2 + 0.1j, 2.0 + 1.0j])
    solver = made(name, 1e-8, 0.0, y0)
    for kind, why in enumerate(COMPLEX[name]):
        which = jnp.asarray(kind, jnp.int32)
        found, seen = watched(_complex, solver, y0, which, max_steps=200)
        assert reason(found) == why
        least = min(scaled_norm(found, f) for _, f in seen if all_finite(f))
        there = scaled_norm(found, np.asarray(_complex(found.value, which)))
        np.testing.assert_allclose([found.stats["residual_norm"], there], least, rtol=1e-9)

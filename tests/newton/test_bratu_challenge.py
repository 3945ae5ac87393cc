"""Bratu in one dimension, a hair below the fold: n = 10⁴, λ = 3.51382."""

import functools

import jax.numpy as jnp
import numpy as np

import nksolve as nks
from nksolve.precondition.block_tridiagonal import BlockTridiagonal
from nksolve.problems import get

from .solving import counters, reason, run, two_norm


@functools.cache
def problem():
    return get("bratu-1d", n=10_000, lam=3.51382)


def solve(linear_solver):
    solver = nks.NewtonKrylov(rtol=0.0, atol=5e-14, linear_solver=linear_solver)
    return run(problem().fn, solver, problem().y0, problem().args, max_steps=30)


def test_block_tridiagonal_reaches_rounding():
    """Exact Newton takes 11 steps; the rounding of the residual is about 1e-14."""
    solution = solve(nks.GMRES(preconditioner=BlockTridiagonal(1)))
    counted = counters(solution)
    assert reason(solution) == "residual_atol"
    assert two_norm(problem().fn(solution.value, problem().args)) <= 5e-14
    np.testing.assert_allclose(jnp.max(solution.value), 1.18394, atol=5e-6)
    assert counted["num_steps"] <= 13 and counted["num_rejected_steps"] == 0
    assert counted["num_matvecs"] <= 2 * counted["num_steps"]
    assert counted["num_probes"] == 3 * counted["num_preconditioner_updates"]


def test_unpreconditioned_gmres_says_that_it_failed():
    solution = solve(nks.GMRES(max_steps=60))
    assert reason(solution) == "linear_solve_failed"
    assert counters(solution)["num_linear_failures"] > 0
    norm = two_norm(problem().fn(solution.value, problem().args))
    assert 1e-7 < norm <= two_norm(problem().fn(problem().y0, problem().args))
    np.testing.assert_allclose(float(solution.stats["residual_norm"]), norm, rtol=1e-10)

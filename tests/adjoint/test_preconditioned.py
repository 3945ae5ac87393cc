"""The adjoint solves with Aᵀ and M⁻ᵀ: as many iterations as textbook GMRES on those matrices."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.problems import get

reference = importlib.import_module("tests.krylov.reference")

CASES = {
    "bratu": (
        get("bratu", n=15),
        nks.Multigrid(get("bratu", n=15).fn, nks.VertexDirichlet(), coarsest=49),
    ),
    "brusselator": (
        get("brusselator", n=8),
        nks.BlockJacobi(coupling=nks.Star(periodic=True)),
    ),
    "food-web": (get("food-web", mx=6), nks.BlockJacobi(coupling=nks.Star())),
}
RTOL = 1e-8


def _dense(operator, y):
    unit = jnp.eye(y.size).reshape(y.size, *y.shape)
    return jax.vmap(operator.mv)(unit).reshape(y.size, y.size).T


@pytest.mark.parametrize("name", CASES)
def test_iterations_of_the_adjoint(name):
    problem, preconditioner = CASES[name]
    krylov = nks.GMRES(restart=100, preconditioner=preconditioner)
    # Somewhere near a root: only the Jacobian matters.
    y = problem.y0 * 1.05 + 0.1 * jnp.cos(jnp.arange(float(problem.y0.size))).reshape(
        problem.y0.shape
    )
    b = jnp.sin(1.0 + jnp.arange(float(y.size))).reshape(y.shape)

    @jax.jit
    def parts(y, b):
        operator = nks.linearise(problem.fn, y, problem.args).operator
        state = krylov.prepare(operator, y, problem.args)
        out = krylov.run(
            state.transpose(), b, tolerance=RTOL * jnp.linalg.norm(b), real=True, verify=True
        )
        return _dense(operator, y), _dense(state.preconditioner, y), out.value, out.num_steps

    matrix, inverse, value, steps = (np.asarray(x) for x in parts(y, b))
    rhs = np.ravel(b)
    run = reference.gmres(matrix.T @ inverse.T, rhs, RTOL * np.linalg.norm(rhs))
    assert abs(int(steps) - (len(run.residuals) - 1)) <= 1
    np.testing.assert_allclose(matrix.T @ np.ravel(value), rhs, atol=2 * RTOL * np.linalg.norm(rhs))
    if not np.allclose(inverse, inverse.T, rtol=1e-6, atol=1e-9 * np.abs(inverse).max()):
        wrong = reference.gmres(matrix.T @ inverse, rhs, RTOL * np.linalg.norm(rhs))
        assert len(wrong.residuals) - 1 > int(steps) + 1  # the transpose matters

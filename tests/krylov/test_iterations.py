"""GMRES takes the steps that theory gives it, whatever the units of the right-hand side."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve import tree
from nksolve.krylov.basis import Basis
from nksolve.krylov.orthogonalise import Appended
from tests.helpers.gallery import from_singular_values
from tests.krylov.reference import contraction, gmres

N = 200


class OnePass(nks.AbstractOrthogonalisation):
    """Classical Gram–Schmidt, once: orthogonal to ε κ²."""

    def append(self, basis, w, filled):
        before = tree.norm2(w)
        h = basis.dots(w, filled)
        w = tree.sub(w, basis.combine(h, filled))
        norm = tree.norm2(w)
        return Appended(basis.set_row(filled, tree.scale(1 / norm, w)), h, norm, before)


def _solve(matrix, rhs, solver, **kwargs):
    return lx.linear_solve(lx.MatrixLinearOperator(matrix), rhs, solver, **kwargs)


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9])
def test_as_many_matvecs_as_the_textbook(rho):
    rng = np.random.default_rng(11)
    matrix, rhs = contraction(rng, N, rho), rng.standard_normal(N)
    traces = []

    @jax.jit
    def solve(rtol):
        traces.append(rtol)
        return _solve(jnp.asarray(matrix), jnp.asarray(rhs), nks.GMRES(rtol=rtol, restart=N)).stats

    run = gmres(matrix, rhs, 1e-10 * np.linalg.norm(rhs))
    for exponent in range(1, 11):
        rtol = 10.0**-exponent
        stats = solve(rtol)
        expected = int(np.argmax(run.residuals <= rtol * np.linalg.norm(rhs)))
        assert abs(int(stats["num_steps"]) - expected) <= 1
        assert int(stats["num_matvecs"]) == int(stats["num_steps"]) + 1
        assert int(stats["num_restarts"]) == 0
    assert len(traces) == 1  # the tolerance is traced


def _graded():
    matrix = from_singular_values(np.random.default_rng(2), np.logspace(0, -8, N))
    return matrix, matrix @ np.ones(N)


@pytest.mark.parametrize(
    ("orthogonalisation", "reaches"), [(nks.CGS2(), True), (OnePass(), False)], ids=["CGS2", "CGS"]
)
def test_ill_conditioned_within_n_steps(orthogonalisation, reaches):
    matrix, rhs = _graded()
    solver = nks.GMRES(rtol=1e-12, restart=N, max_steps=N, orthogonalisation=orthogonalisation)
    solution = eqx.filter_jit(_solve)(jnp.asarray(matrix), jnp.asarray(rhs), solver, throw=False)
    true = np.linalg.norm(rhs - matrix @ np.asarray(solution.value)) / np.linalg.norm(rhs)
    assert int(solution.stats["num_steps"]) <= N
    assert (true <= 1e-12) == reaches
    assert bool(solution.result == lx.RESULTS.successful) == reaches


def _arnoldi(orthogonalisation, matrix, rhs, steps):
    """(V, H̄, ‖w − V h − ‖…‖ v‖) of an Arnoldi loop driven by hand."""
    matrix, rhs = jnp.asarray(matrix), jnp.asarray(rhs)
    append = jax.jit(orthogonalisation.append)
    basis = append(Basis.allocate(rhs, steps + 1, real=True), rhs, jnp.int32(0)).basis
    hessenberg = np.zeros((steps + 1, steps))
    for j in range(steps):
        w = matrix @ basis.row(jnp.int32(j))
        new = append(basis, w, jnp.int32(j + 1))
        np.testing.assert_allclose(new.norm_before, np.linalg.norm(w), rtol=1e-12)
        hessenberg[:, j] = new.coefficients
        hessenberg[j + 1, j] = new.norm
        basis = new.basis
    rows = np.stack([basis.row(jnp.int32(i)) for i in range(steps + 1)])
    return rows, hessenberg


@pytest.mark.parametrize("orthogonalisation", [nks.CGS2(), nks.MGS()], ids=["CGS2", "MGS"])
def test_arnoldi_relation_and_orthogonality(orthogonalisation):
    n, steps = 60, 14
    i = np.arange(n)
    matrix = 1.0 / (i[:, None] + i[None, :] + 1.0)
    rows, hessenberg = _arnoldi(orthogonalisation, matrix, np.ones(n), steps)
    relation = matrix @ rows[:-1].T - rows.T @ hessenberg
    assert np.abs(relation).max() < 1e-14
    loss = np.linalg.norm(rows @ rows.T - np.eye(steps + 1), 2)
    if isinstance(orthogonalisation, nks.CGS2):
        assert loss < 1e-13
    else:  # ε κ: the Krylov vectors of a Hilbert matrix are all but dependent
        assert loss > 1e-10


@pytest.mark.parametrize("solver", [nks.GMRES, nks.FGMRES])
def test_float32_does_not_depend_on_the_units(solver):
    rng = np.random.default_rng(5)
    matrix = jnp.asarray(contraction(rng, 64, 0.7), jnp.float32)
    rhs = rng.standard_normal(64)
    solve = eqx.filter_jit(lambda b: _solve(matrix, b, solver(rtol=1e-4, restart=20)))
    exponents = (0, -20, -8, -6, -4, -2, 2, 4, 6, 8, 20)
    steps = [
        int(solve(jnp.asarray(rhs * 10.0**exponent, jnp.float32)).stats["num_steps"])
        for exponent in exponents
    ]
    assert steps[0] > 5 and set(steps) == {steps[0]}

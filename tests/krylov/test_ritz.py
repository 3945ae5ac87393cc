"""Ritz values of the last cycle are eigenvalues, or near them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.krylov.ritz import ArnoldiRecord, harmonic_ritz_values, ritz_values
from nksolve.problems.bratu import bratu
from tests.krylov.reference import contraction


@eqx.filter_jit
def _record(matrix, rhs, solver):
    solution = lx.linear_solve(lx.MatrixLinearOperator(matrix), rhs, solver, throw=False)
    record = solution.stats["arnoldi"]
    return record, ritz_values(record), harmonic_ritz_values(record)


def _sorted(values):
    values = np.asarray(values)
    return values[np.lexsort((values.imag, values.real))]


@pytest.mark.parametrize("method", [nks.GMRES, nks.FGMRES])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_eigenvalues_once_the_space_is_full(method, dtype):
    rng, n = np.random.default_rng(0), 17
    matrix = contraction(rng, n, 0.8).astype(dtype)
    if dtype == np.complex128:
        matrix = matrix + 0.5j * np.diag(np.arange(n) / n)
    rhs = rng.standard_normal(n).astype(dtype)
    record, values, harmonic = _record(
        jnp.asarray(matrix), jnp.asarray(rhs), method(rtol=1e-15, restart=n)
    )
    assert int(record.columns) == n
    expected = _sorted(np.linalg.eigvals(matrix))
    np.testing.assert_allclose(_sorted(values), expected, atol=1e-10)
    np.testing.assert_allclose(_sorted(harmonic), expected, atol=1e-9)
    assert np.all(np.diff(np.abs(values)) >= -1e-12)


def test_nan_beyond_the_columns_and_harmonic_values_by_their_definition():
    rng, n = np.random.default_rng(1), 40
    matrix, rhs = contraction(rng, n, 0.7), rng.standard_normal(n)
    record, values, harmonic = _record(
        jnp.asarray(matrix), jnp.asarray(rhs), nks.GMRES(rtol=1e-3, restart=25)
    )
    j = int(record.columns)
    assert 3 < j < 25
    h = np.asarray(record.matrix)
    assert not h[:, j:].any()
    square, whole = h[:j, :j], h[: j + 1, :j]
    np.testing.assert_allclose(_sorted(values[:j]), _sorted(np.linalg.eigvals(square)), atol=1e-10)
    # H̄ᴴH̄ z = θ Hᴴ z
    expected = np.linalg.eigvals(np.linalg.solve(square.T, whole.T @ whole))
    np.testing.assert_allclose(_sorted(harmonic[:j]), _sorted(expected), atol=1e-9)
    assert np.all(np.isnan(values[j:])) and np.all(np.isnan(harmonic[j:]))
    empty = ArnoldiRecord.allocate(jnp.ones(3), 4, real=True)
    assert np.all(np.isnan(ritz_values(empty)))


def test_the_edges_of_the_spectrum_of_bratu_and_the_preconditioned_operator():
    problem = bratu(12, 5.0)
    operator = nks.linearise(problem.fn, problem.y0 + 0.5, problem.args).operator
    spectrum = np.linalg.eigvalsh(np.asarray(operator.as_matrix()).reshape(144, 144))
    b = jnp.asarray(np.random.default_rng(0).standard_normal((12, 12)))

    @eqx.filter_jit
    def values(scale):
        inverse = nks.UserPreconditioner(lambda *_: lambda v: scale * v)
        solver = nks.FGMRES(rtol=1e-6, restart=60, preconditioner=inverse)
        return ritz_values(lx.linear_solve(operator, b, solver).stats["arnoldi"])

    for scale in (1.0, 0.25):
        found = np.asarray(values(jnp.asarray(scale)))
        found = found[~np.isnan(found)]
        assert np.abs(found.imag).max() < 1e-10
        np.testing.assert_allclose(found.real.max(), scale * spectrum[-1], rtol=1e-3)
        np.testing.assert_allclose(found.real.min(), scale * spectrum[0], rtol=1e-2)


def test_of_the_last_newton_step_and_of_each_lane():
    rng, n = np.random.default_rng(5), 30
    matrices = jnp.asarray(np.stack([contraction(rng, n, rho) for rho in (0.3, 0.6, 0.9)]))
    newton = nks.NewtonKrylov(1e-10, 0.0, linear_solver=nks.GMRES(restart=20))

    def solve(matrix):
        solution = nks.root_find(lambda y, m: m @ y - jnp.ones(n), newton, jnp.zeros(n), matrix)
        return solution.stats["arnoldi"]

    records = jax.jit(jax.vmap(solve))(matrices)
    values = jax.vmap(ritz_values)(records)
    assert len({int(c) for c in records.columns}) > 1
    for lane in range(3):
        alone = jax.jit(solve)(matrices[lane])
        assert int(alone.columns) == int(records.columns[lane]) > 0
        np.testing.assert_allclose(alone.matrix, records.matrix[lane], atol=1e-7)
        one, other = np.asarray(ritz_values(alone)), np.asarray(values[lane])
        assert np.sum(~np.isnan(one)) == np.sum(~np.isnan(other)) == int(alone.columns)

"""Deflation: outliers moved to σ, and what that saves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.precondition.deflation import Deflation, DeflationOf
from tests.helpers import Counter

N = 60
_rng = np.random.default_rng(21)
_X = np.linalg.qr(_rng.standard_normal((N, N)))[0] + 0.02 * _rng.standard_normal((N, N))
# Five outliers: four far out, one near zero; the bulk about 1.
_EIGENVALUES = np.r_[60.0, 40.0, -30.0, 20.0, 8.0, _rng.uniform(0.7, 1.3, N - 5)]
A = _X @ np.diag(_EIGENVALUES) @ np.linalg.inv(_X)
SYMMETRIC = (lambda q: q @ np.diag(_EIGENVALUES) @ q.T)(np.linalg.qr(_X)[0])


def _operator(matrix, counter=None):
    tick = (lambda v: v) if counter is None else counter.tick
    y = jnp.zeros(matrix.shape[0], matrix.dtype)
    return nks.linearise(lambda y, m: m @ tick(y), y, jnp.asarray(matrix)).operator


@eqx.filter_jit
def _matrices(preconditioner, operator):
    inverse = preconditioner.as_operator(preconditioner.init(operator, None, None))
    eye = jnp.eye(N, dtype=inverse.in_structure().dtype)
    return jax.vmap(inverse.mv)(eye).T, jax.vmap(inverse.transpose().mv)(eye).T


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
def test_outliers_are_moved_to_sigma(dtype):
    """The spectrum of J M⁻¹: k eigenvalues at σ, the rest the bulk."""
    a = A.astype(dtype) * (1 + 0.2j if dtype == np.complex128 else 1)
    sigma = 1 + 0.2j if dtype == np.complex128 else 1.0
    m, mt = _matrices(Deflation(5, jnp.asarray(sigma), iterations=12), _operator(a.astype(dtype)))
    tol = 1e-3 if dtype == np.float32 else 1e-8
    values = np.linalg.eigvals(a @ m)
    assert m.dtype == dtype
    bulk = np.r_[_EIGENVALUES[5:], np.ones(5)] * (sigma if dtype == np.complex128 else 1)
    np.testing.assert_allclose(np.sort_complex(values), np.sort_complex(bulk), atol=20 * tol)
    np.testing.assert_allclose(mt, m.T, atol=tol)


def test_symmetric_stays_symmetric():
    m, _ = _matrices(Deflation(5, 1.0, iterations=3), _operator(SYMMETRIC))
    np.testing.assert_allclose(m, m.T, atol=1e-12)


def test_given_vectors():
    """The formula, densely, for vectors that are not orthonormal and not invariant."""
    v = _rng.standard_normal((3, N))
    for given in (jnp.asarray(v), lambda y, args: jnp.asarray(v)):
        m, mt = _matrices(DeflationOf(given, 2.0), _operator(A))
        q = np.linalg.qr(v.T)[0]
        h = q.T @ A @ q
        exact = np.eye(N) + q @ (2.0 * np.linalg.inv(h) - np.eye(3)) @ q.T
        np.testing.assert_allclose(m, exact, atol=1e-11)
        np.testing.assert_allclose(mt, exact.T, atol=1e-11)
    with pytest.raises(ValueError, match="leading"):
        DeflationOf(jnp.ones((2, 5))).init(_operator(A), None, None)


def test_it_saves_iterations():
    """GMRES to 1e-8: the five outliers cost it more than as many iterations when restarted."""
    b = jnp.asarray(_rng.standard_normal(N))

    @jax.jit
    def steps(a, b):
        operator = nks.linearise(lambda y, m: m @ y, b, a).operator
        preconditioners = nks.Identity(), Deflation(5, iterations=3)
        solvers = [nks.GMRES(rtol=1e-8, restart=8, preconditioner=p) for p in preconditioners]
        out = [lx.linear_solve(operator, b, solver, throw=False) for solver in solvers]
        return [(o.value, o.stats["num_steps"], o.stats["residual_norm"]) for o in out]

    (_, plain, _), (x, deflated, _) = steps(jnp.asarray(A), b)
    np.testing.assert_allclose(x, np.linalg.solve(A, b), rtol=1e-5, atol=1e-7)
    assert 2 * int(deflated) <= int(plain)


def test_matvecs_are_as_stated():
    counter = Counter()
    operator = _operator(A, counter)
    for preconditioner, batches in (
        (Deflation(4, iterations=2), [4, 4, 4]),
        (DeflationOf(jnp.asarray(_X.T[:3])), [3]),
    ):
        with counter.measure() as count:
            preconditioner.init(operator, None, None)
        assert count.lanes("tangent") == batches
        assert preconditioner.num_probes(operator, None, None) == sum(batches)


def test_singular_is_left_alone():
    a = np.diag(np.r_[0.0, np.ones(N - 1)])
    m, _ = _matrices(DeflationOf(jnp.eye(N)[:1]), _operator(a))
    np.testing.assert_allclose(m, np.eye(N))


def test_through_newton():
    fn = lambda y, k: jnp.asarray(A) @ y + 0.1 * jnp.sin(y) - k
    krylov = nks.GMRES(rtol=1e-10, restart=20, preconditioner=Deflation(5))
    solver = nks.NewtonKrylov(rtol=1e-9, atol=1e-12, linear_solver=krylov)

    def solve(k):
        solution = nks.root_find(fn, solver, jnp.zeros(N), k)
        return solution.value, solution.stats

    k = jnp.linspace(0.0, 1.0, N)

    @jax.jit
    def run(k):
        loss = lambda k: (lambda out: (jnp.sum(out[0]), out))(solve(k))
        gradient, out = jax.grad(loss, has_aux=True)(k)
        return gradient, out, jax.vmap(solve)(jnp.stack([k, 0 * k]))

    gradient, (y, stats), (values, batch) = run(k)
    np.testing.assert_allclose(fn(y, k), 0, atol=1e-7)
    jacobian = A + np.diag(0.1 * np.cos(y))
    np.testing.assert_allclose(gradient, np.linalg.solve(jacobian.T, np.ones(N)), rtol=1e-6)
    assert int(stats["num_probes"]) == 15 * int(stats["num_steps"]) > 0
    np.testing.assert_allclose(values[0], y, atol=1e-8)
    assert batch["num_probes"].tolist() == [int(stats["num_probes"]), 0]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Deflation(3, iterations=0)

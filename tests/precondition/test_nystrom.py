"""Nystrom: exact where J is σI plus low rank, close where it nearly is."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.linearise.probing import ravel, unravel
from nksolve.precondition.lagged import Lagged
from nksolve.precondition.nystrom import Nystrom
from tests.helpers import Counter

N = 31
_rng = np.random.default_rng(12)
_U, _W = _rng.standard_normal((2, N, 4)) / np.sqrt(N)
LOW_RANK = 2.0 * _U @ _W.T
STRUCTURE = {
    "a": jax.ShapeDtypeStruct((3, 7), jnp.float64),
    "b": jax.ShapeDtypeStruct((10,), jnp.float64),
}


def _operator(matrix, counter=None):
    structure = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, matrix.dtype), STRUCTURE)
    tick = (lambda v: v) if counter is None else counter.tick
    y = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), structure)
    fn = lambda y, m: unravel(m @ tick(ravel(y)), structure)
    return nks.linearise(fn, y, jnp.asarray(matrix)).operator


@eqx.filter_jit
def _matrices(preconditioner, operator):
    inverse = preconditioner.as_operator(preconditioner.init(operator, None, None))
    structure = inverse.in_structure()
    eye = jnp.eye(N, dtype=structure["a"].dtype)
    columns = lambda op: jax.vmap(lambda e: ravel(op.mv(unravel(e, structure))))(eye).T
    return columns(inverse), columns(inverse.transpose())


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
def test_low_rank_changes_of_the_identity(dtype):
    """Exact where J is symmetric; (J M⁻¹ − I)² = 0, with no more than rounding, where it is not."""
    tol = 1e-4 if dtype == np.float32 else 1e-11
    twist, sigma = (1 + 0.5j, -3.0 + 1j) if dtype == np.complex128 else (1, -3.0)
    a = (sigma * np.eye(N) - twist * LOW_RANK).astype(dtype)
    hermitian = (np.eye(N) - _U @ _U.T).astype(dtype)
    m, mt = _matrices(Nystrom(6, jnp.asarray(sigma)), _operator(a))
    m, mt = np.asarray(m), np.asarray(mt)
    error = a @ m - np.eye(N)
    assert m.dtype == dtype and np.max(np.abs(error)) > 1e-3
    np.testing.assert_allclose(error @ error, 0, atol=tol)
    np.testing.assert_allclose(mt, m.T, atol=tol)
    m, mt = _matrices(Nystrom(6), _operator(hermitian))
    np.testing.assert_allclose(m, np.linalg.inv(hermitian), rtol=tol, atol=10 * tol)
    np.testing.assert_allclose(mt, m.T, atol=10 * tol)


def test_m_agrees_with_j_on_the_basis():
    """Full J: M Q = J Q, so M⁻¹J is the identity on k dimensions."""
    a = np.eye(N) + 0.3 * _rng.standard_normal((N, N))
    m, mt = _matrices(Nystrom(5), _operator(a))
    singular = np.linalg.svd(m @ a - np.eye(N), compute_uv=False)
    assert np.sum(singular < 1e-12) >= 5 and np.sum(singular > 1e-3) >= N - 10
    np.testing.assert_allclose(mt, m.T, atol=1e-13)
    m, _ = _matrices(Nystrom(99), _operator(a))  # no more probes than unknowns
    np.testing.assert_allclose(m, np.linalg.inv(a), atol=1e-9)


def test_matvecs_are_as_stated():
    counter = Counter()
    operator = _operator(np.eye(N) - LOW_RANK, counter)
    with counter.measure() as count:
        Nystrom(5).init(operator, None, None)
    assert count.lanes("tangent") == [5, 5]
    assert Nystrom(5).num_probes(operator, None, None) == 10
    assert Nystrom(99).num_probes(operator, None, None) == 2 * N


def test_singular():
    """J singular on the sketched space: finite, the identity over σ."""
    u = np.eye(N)[:, :1]
    m, _ = _matrices(Nystrom(1), _operator(np.eye(N) - u @ u.T))
    np.testing.assert_allclose(m, np.eye(N))


def _layer(z, theta):
    """An implicit layer whose W has three directions of gain near one."""
    w, x = theta
    return {"a": z["a"] - jnp.tanh(w @ z["a"] + x), "b": z["b"] - 0.1 * jnp.sin(z["b"]) - 1.0}


def test_through_newton():
    """Krylov iterations on I − W fall to a third at most; gradients dense; lanes as alone."""
    n = 40
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0][:, :8]
    w = jnp.asarray(q @ np.diag(np.linspace(0.7, 0.995, 8)) @ q.T)
    x = jnp.asarray(0.1 * rng.standard_normal(n))

    def solve(preconditioner, x):
        krylov = nks.GMRES(rtol=1e-10, restart=30, preconditioner=preconditioner)
        solver = nks.NewtonKrylov(
            rtol=1e-9,
            atol=1e-12,
            linear_solver=krylov,
            forcing=nks.ConstantForcing(1e-6),
            globalisation=nks.FullStep(),
        )
        start = {"a": jnp.zeros(n), "b": jnp.zeros(2)}
        solution = nks.root_find(_layer, solver, start, (w, x))
        return solution.value["a"], solution.stats

    @jax.jit
    def run(x):
        _, plain = solve(nks.Identity(), x)
        loss = lambda x: (lambda out: (jnp.sum(out[0]), out))(solve(Nystrom(10), x))
        gradient, (z, stats) = jax.grad(loss, has_aux=True)(x)
        lagged = lambda x: solve(Lagged(Nystrom(10), max_age=3), x)
        values, batch = jax.vmap(lagged)(jnp.stack([x, 3 * x]))
        return plain, gradient, z, stats, values, batch

    plain, gradient, z, stats, values, batch = run(x)
    np.testing.assert_allclose(z, np.tanh(np.asarray(w) @ z + x), atol=1e-8)
    d = 1 - np.asarray(z) ** 2
    jacobian = np.eye(n) - d[:, None] * np.asarray(w)
    np.testing.assert_allclose(gradient, d * np.linalg.solve(jacobian.T, np.ones(n)), rtol=1e-6)
    assert 3 * int(stats["num_matvecs"]) <= int(plain["num_matvecs"])
    assert int(stats["num_probes"]) == 20 * int(stats["num_steps"])
    np.testing.assert_allclose(values[0], z, atol=1e-7)
    expected = [20 * -(-n // 3) for n in batch["num_steps"].tolist()]
    assert batch["num_probes"].tolist() == expected


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="rank"):
        Nystrom(0)
    y = {"r": jnp.zeros(2), "c": jnp.zeros(2, complex)}
    operator = nks.linearise(lambda y, _: y, y).operator
    with pytest.raises(ValueError, match="FieldSplit"):
        Nystrom(1).init(operator, None, None)

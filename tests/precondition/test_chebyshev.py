"""Chebyshev: the polynomial by its closed form, its bounds, its matvecs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.precondition.chebyshev import Chebyshev
from tests.helpers import Counter

N = 23
_rng = np.random.default_rng(6)
_Q = np.linalg.qr(_rng.standard_normal((N, N)))[0]
_EIGENVALUES = np.geomspace(0.5, 40.0, N)
SPD = _Q @ np.diag(_EIGENVALUES) @ _Q.T


def _operator(matrix, counter=None):
    tick = (lambda v: v) if counter is None else counter.tick
    y = jnp.zeros(matrix.shape[0], matrix.dtype)
    return nks.linearise(lambda y, m: m @ tick(y), y, jnp.asarray(matrix)).operator


def _matrices(preconditioner, operator):
    """M⁻¹ and M⁻ᵀ, column by column."""

    @eqx.filter_jit
    def run(operator):
        inverse = preconditioner.as_operator(preconditioner.init(operator, None, None))
        eye = jnp.eye(N, dtype=inverse.in_structure().dtype)
        return jax.vmap(inverse.mv)(eye).T, jax.vmap(inverse.transpose().mv)(eye).T

    return run(operator)


def _chebyshev(k, x):
    """T_k, also outside [−1, 1]."""
    t = np.zeros(k + 1)
    t[k] = 1
    return np.polynomial.chebyshev.chebval(x, t)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
@pytest.mark.parametrize("sign", [1, -1])
def test_it_is_the_polynomial(dtype, sign):
    """1 − λp(λ) = T_{d+1}((b + a − 2λ)/(b − a)) / T_{d+1}((b + a)/(b − a)), also of Jᵀ."""
    a, b, degree = 0.5, 40.0, 4
    matrix = SPD.astype(dtype)
    if dtype == np.complex128:  # Hermitian, so that J and Jᵀ differ
        phase = np.exp(1j * np.arange(N))
        matrix = phase[:, None] * matrix * phase.conj()
    bounds = (a, b) if sign > 0 else (-b, -a)
    preconditioner = Chebyshev(degree, bounds)
    m, mt = _matrices(preconditioner, _operator((sign * matrix).astype(dtype)))
    assert m.dtype == dtype
    ratio = _chebyshev(degree + 1, (b + a - 2 * _EIGENVALUES) / (b - a))
    ratio = ratio / _chebyshev(degree + 1, (b + a) / (b - a))
    q = _Q if dtype != np.complex128 else phase[:, None] * _Q
    exact = sign * q @ np.diag((1 - ratio) / _EIGENVALUES) @ q.conj().T
    tol = 1e-4 if dtype == np.float32 else 1e-11
    np.testing.assert_allclose(m, exact, rtol=tol, atol=tol)
    np.testing.assert_allclose(mt, exact.T, rtol=tol, atol=tol)


@pytest.mark.parametrize("sign", [1, -1])
def test_estimated_bounds_hold(sign):
    """b is beyond the last eigenvalue, not far, and M⁻¹J is definite."""
    for matrix in (SPD, np.eye(N) * 3.0, SPD - 0.4 * np.eye(N)):
        m, _ = _matrices(Chebyshev(6, probes=8), _operator(sign * matrix))
        values = np.linalg.eigvals(m @ matrix * sign)
        assert np.all(values.real > 1e-3) and np.all(np.abs(values.imag) < 1e-10)
        assert np.max(values.real) < 2.0 + 1e-9
    a, b = Chebyshev(1, probes=N)._estimated(_operator(sign * SPD))
    np.testing.assert_allclose([a, b], sign * np.array([0.5, 1.05 * 40.0]), rtol=0.1)


def test_matvecs_are_as_stated():
    counter = Counter()
    operator = _operator(SPD, counter)
    preconditioner = Chebyshev(5, probes=7)
    assert preconditioner.matvecs_per_application(operator) == 5
    with counter.measure() as count:
        state = preconditioner.init(operator, None, None)
    assert count.tangent == preconditioner.num_probes(operator, None, None) == 7
    assert Chebyshev(5, (1.0, 2.0)).num_probes(operator, None, None) == 0
    inverse = preconditioner.as_operator(state)
    with counter.measure() as count:
        inverse.mv(jnp.ones(N))
    assert count.tangent == 5
    with counter.measure() as count:
        inverse.transpose().mv(jnp.ones(N))
    assert count.transposed == 5


def test_zero_and_nan_make_no_trouble():
    m, _ = _matrices(Chebyshev(3), _operator(np.zeros((N, N))))
    assert np.all(np.isfinite(m))
    broken = SPD.copy()
    broken[2, 3] = np.nan
    operator = _operator(broken)
    inverse = Chebyshev(3).as_operator(Chebyshev(3).init(operator, None, None))
    assert np.isnan(inverse.mv(jnp.ones(N))).any()  # of J itself, reported by the Krylov method


def test_through_newton():
    """Iterations fall; the gradient by a dense solve; lanes as alone."""
    fn = lambda y, k: jnp.asarray(SPD) @ y + y**3 - k

    def solver(preconditioner):
        krylov = nks.GMRES(rtol=1e-10, restart=N, preconditioner=preconditioner)
        return nks.NewtonKrylov(rtol=1e-10, atol=1e-12, linear_solver=krylov)

    def solve(preconditioner, k):
        solution = nks.root_find(fn, solver(preconditioner), jnp.zeros(N), k)
        return solution.value, solution.stats

    bounded = Chebyshev(5, lambda y, k: (0.5, 40.0 + 3 * jnp.max(y**2)))
    k = jnp.linspace(1.0, 5.0, N)

    @jax.jit
    def run(k):
        _, plain = solve(nks.Identity(), k)
        gradient, (y, stats) = jax.grad(
            lambda k: (lambda out: (jnp.sum(out[0]), out))(solve(Chebyshev(5), k)), has_aux=True
        )(k)
        values, batch = jax.vmap(lambda k: solve(bounded, k))(jnp.stack([k, k / 9]))
        return plain, gradient, y, stats, values, batch

    plain, gradient, y, stats, values, batch = run(k)
    np.testing.assert_allclose(fn(y, k), 0, atol=1e-8)
    np.testing.assert_allclose(
        gradient, np.linalg.solve(SPD + np.diag(3 * np.asarray(y) ** 2), np.ones(N)), rtol=1e-6
    )
    assert 2 * int(stats["num_matvecs"]) < int(plain["num_matvecs"])
    steps = int(stats["num_steps"])
    assert int(stats["num_preconditioner_updates"]) == steps
    assert int(stats["num_probes"]) == 10 * steps
    np.testing.assert_allclose(values[0], y, atol=1e-8)
    np.testing.assert_allclose(fn(values[1], k / 9), 0, atol=1e-8)
    assert batch["num_probes"].tolist() == [0, 0]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="negative"):
        Chebyshev(-1)
    with pytest.raises(ValueError, match="one sign"):
        Chebyshev(3, (-1.0, 2.0))
    with pytest.raises(ValueError, match="probes"):
        Chebyshev(3, probes=0)

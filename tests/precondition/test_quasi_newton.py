"""QuasiNewton: Broyden's updates against their dense formula, and what they save."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.krylov.inner import InnerKrylov
from nksolve.precondition.field_split import FieldSplit
from nksolve.precondition.quasi_newton import QuasiNewton
from tests.helpers import Counter

N = 17
_rng = np.random.default_rng(3)
_BASE = _rng.standard_normal((N, N)) / 10 + np.eye(N)


def _linear(matrix):
    y = jnp.zeros(N, matrix.dtype)
    return nks.linearise(lambda y, m: m @ y, y, jnp.asarray(matrix)).operator


def _columns(operator):
    eye = jnp.eye(N, dtype=operator.in_structure().dtype)
    return jax.vmap(operator.mv)(eye).T, jax.vmap(operator.transpose().mv)(eye).T


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
def test_updates_are_broydens(dtype):
    """Dense P⁻¹, update by update, across a restart; the secant equation; the transpose."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: (
        rng.standard_normal(shape)
        + (1j * rng.standard_normal(shape) if dtype == np.complex128 else 0)
    ).astype(dtype)
    base = (_BASE + 0.05 * draw(N, N)).astype(dtype)
    preconditioner = QuasiNewton(
        nks.UserPreconditioner(lambda *_: lambda v: jnp.asarray(base) @ v), memory=3
    )

    @eqx.filter_jit
    def step(state, matrix, y):
        state = preconditioner.update(state, _linear(matrix), y, None)
        return state, _columns(preconditioner.as_operator(state))

    points = [draw(N) for _ in range(6)]
    matrices = [(np.eye(N) + 0.2 * draw(N, N) / np.sqrt(N)).astype(dtype) for _ in range(6)]
    state = preconditioner.init(_linear(matrices[0]), jnp.asarray(points[0]), None)
    dense = base
    tol = 1e-3 if dtype == np.float32 else 1e-11
    for k in range(1, 6):
        state, (m, mt) = step(state, jnp.asarray(matrices[k]), jnp.asarray(points[k]))
        if k == 4:  # the memory was full: made anew
            dense = base
        else:
            s = points[k] - points[k - 1]
            y = matrices[k] @ s
            z = dense @ y
            dense = dense - np.outer(z - s, s.conj() @ dense) / (s.conj() @ z)
            np.testing.assert_allclose(m @ y, s, rtol=tol, atol=10 * tol)
        np.testing.assert_allclose(m, dense, rtol=tol, atol=10 * tol)
        np.testing.assert_allclose(mt, dense.T, rtol=tol, atol=10 * tol)
        assert m.dtype == dtype


def test_unsound_pairs_change_nothing():
    """No step; sᵀP⁻¹y = 0; NaN in J."""
    preconditioner = QuasiNewton(memory=3)
    swap = np.roll(np.eye(N), 1, 0)  # ⟨s, J s⟩ = 0 for s = e₀
    s = jnp.eye(N)[0]
    for matrix, y in ((np.eye(N), 0 * s), (swap, s), (np.nan * swap, s)):
        state = preconditioner.init(_linear(np.eye(N)), jnp.zeros(N), None)
        state = preconditioner.update(state, _linear(matrix), y, None)
        m, _ = _columns(preconditioner.as_operator(state))
        np.testing.assert_array_equal(m, np.eye(N))
        assert int(state.count) == 1


COUNTER = Counter()


def _fn(y, k):
    n = y.shape[0]
    stiff = jnp.linspace(1.0, 50.0, n)
    return stiff * y + 30 * jnp.sum(y) / n * jnp.ones(n) + jnp.sum(y**2) * y / n - k


def test_through_newton():
    """Probes and matvecs as counted; gradient dense; lanes as alone; fewer matvecs than P₀'s."""
    n = 29
    base = nks.Jacobi(lambda y, k: jnp.linspace(1.0, 50.0, n))
    fn = lambda y, k: _fn(COUNTER.tick(y), k)

    def solve(preconditioner, k, fn=_fn):
        krylov = nks.GMRES(rtol=1e-11, restart=n, preconditioner=preconditioner)
        solver = nks.NewtonKrylov(
            rtol=1e-10, atol=1e-12, linear_solver=krylov, forcing=nks.ConstantForcing(1e-1)
        )
        solution = nks.root_find(fn, solver, jnp.ones(n), k)
        return solution.value, solution.stats

    k = jnp.linspace(10.0, 60.0, n)
    updated = QuasiNewton(base, memory=4)
    counted = jax.jit(lambda k: solve(updated, k, fn))
    with COUNTER.measure() as count:
        y, stats = counted(k)
    steps, probes = int(stats["num_steps"]), int(stats["num_probes"])
    assert steps >= 5
    restarts = (steps - 1) // 5
    assert probes == steps - 1 - restarts
    assert int(stats["num_preconditioner_updates"]) == steps
    assert count.tangent == int(stats["num_matvecs"]) + probes

    @jax.jit
    def run(k):
        _, plain = solve(base, k)
        gradient = jax.grad(lambda k: jnp.sum(solve(updated, k)[0]))(k)
        return plain, gradient, jax.vmap(lambda k: solve(updated, k))(jnp.stack([k, k / 50]))

    plain, gradient, (values, batch) = run(k)
    np.testing.assert_allclose(_fn(y, k), 0, atol=1e-7)
    jacobian = jax.jacfwd(_fn)(y, k)
    np.testing.assert_allclose(gradient, np.linalg.solve(jacobian.T, np.ones(n)), rtol=1e-6)
    np.testing.assert_allclose(values[0], y, atol=1e-8)
    np.testing.assert_allclose(_fn(values[1], k / 50), 0, atol=1e-8)
    assert int(batch["num_matvecs"][0]) == int(stats["num_matvecs"])
    assert int(stats["num_matvecs"]) < int(plain["num_matvecs"])


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="memory"):
        QuasiNewton(memory=0)
    with pytest.raises(ValueError, match="linear"):
        QuasiNewton(InnerKrylov(nks.GMRES()))
    y = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    operator = nks.linearise(lambda y, _: y, y).operator
    with pytest.raises(ValueError, match="around the field split"):
        FieldSplit({"a": QuasiNewton(), "b": nks.Identity()}).init(operator, y, None)

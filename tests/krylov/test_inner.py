"""A Krylov method inside FGMRES: answers, matvecs, adjoint, Newton."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.krylov.inner import InnerKrylov
from nksolve.precondition.composite import Multiplicative
from nksolve.precondition.lagged import Lagged
from tests.helpers import Counter

N = 61
_rng = np.random.default_rng(4)
_DIAGONAL = np.geomspace(1.0, 300.0, N)
A = jnp.asarray(np.diag(_DIAGONAL) + np.diag(0.5 * _DIAGONAL[:-1], 1) + 0.1 * np.tri(N, N, -2))
B = jnp.asarray(_rng.standard_normal(N))


def _jacobi(dtype=jnp.float64):
    return nks.UserPreconditioner(lambda *_: lambda v: v / jnp.asarray(_DIAGONAL).astype(v.dtype))


def _inner(**kwargs):
    return InnerKrylov(nks.GMRES(**{"rtol": 1e-2, "max_steps": 8, "restart": 8, **kwargs}))


def _solve(solver, a, b, counter=None):
    tick = (lambda v: v) if counter is None else counter.tick
    operator = nks.linearise(lambda y, m: m @ tick(y), jnp.zeros_like(b), a).operator
    return lx.linear_solve(operator, b, solver, throw=False)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.complex128])
def test_forward_and_transposed(dtype):
    """Dense answers, few outer iterations both ways, and no more matvecs than stated."""
    counter = Counter()
    inner = _inner(preconditioner=_jacobi())
    rtol = 1e-5 if dtype == jnp.float32 else 1e-10
    solver = nks.FGMRES(rtol=rtol, preconditioner=inner)
    twist = 1 + 0.3j if dtype == jnp.complex128 else 1
    a, b = A.astype(dtype) * twist, B.astype(dtype)

    @jax.jit
    def both(a, b):
        def solve(b):
            solution = _solve(solver, a, b, counter)
            return solution.value, solution.stats

        value, pull, stats = jax.vjp(solve, b, has_aux=True)
        return value, pull(b)[0], stats

    with counter.measure() as count:
        value, cotangent, stats = both(a, b)
    exact, transposed = np.linalg.solve(a, b), np.linalg.solve(np.asarray(a).T, b)
    scale = np.linalg.norm(exact), np.linalg.norm(transposed)
    assert np.linalg.norm(value - exact) <= 100 * rtol * scale[0]
    assert np.linalg.norm(cotangent - transposed) <= 1e3 * rtol * scale[1]
    applications = int(stats["num_preconditioner_applications"])
    assert int(stats["num_steps"]) == applications <= 8
    operator = nks.linearise(lambda y, m: m @ y, b, a).operator
    bound = inner.matvecs_per_application(operator)
    assert bound == 9
    outer = int(stats["num_matvecs"])
    assert outer < count.tangent <= outer + bound * applications
    assert 0 < count.transposed <= 3 * count.tangent


def test_one_outer_iteration_where_the_inner_is_tight():
    solver = nks.FGMRES(rtol=1e-8, preconditioner=_inner(rtol=1e-11, max_steps=80, restart=61))
    solution = jax.jit(lambda b: _solve(solver, A, b).stats)(B)
    assert int(solution["num_steps"]) == 1


def test_zero_and_nan():
    solver = nks.FGMRES(rtol=1e-8, preconditioner=_inner())
    solve = jax.jit(lambda b: (lambda s: (s.value, s.result))(_solve(solver, A, b)))
    value, result = solve(jnp.zeros(N))
    assert bool(result == lx.RESULTS.successful) and not np.any(value)
    value, result = solve(B.at[3].set(jnp.nan))
    assert bool(result == lx.RESULTS.breakdown) and np.all(np.isfinite(value))


def test_is_variable_and_says_so():
    assert _inner().is_variable
    assert Lagged(_inner()).is_variable
    assert Multiplicative([nks.Identity(), _inner()]).is_variable
    assert not Multiplicative([nks.Identity(), nks.Identity()]).is_variable
    with pytest.raises(TypeError, match="Krylov"):
        InnerKrylov(lx.LU())  # pyright: ignore


def _fn(y, k):
    return y**3 + A @ y - k


@pytest.mark.parametrize(
    "own",
    [nks.Jacobi(lambda y, k: 3 * y**2 + _DIAGONAL), Lagged(_jacobi(), max_age=2)],
    ids=["", "lagged"],
)
def test_through_newton(own):
    """Root, gradient, lanes; a lagged preconditioner inside is not refreshed each time, while J
    itself is that of the step."""
    krylov = nks.FGMRES(rtol=1e-10, preconditioner=_inner(preconditioner=own))
    solver = nks.NewtonKrylov(rtol=1e-10, atol=1e-12, linear_solver=krylov)

    def solve(k):
        solution = nks.root_find(_fn, solver, jnp.zeros(N), k)
        return solution.value, solution.stats

    k = jnp.linspace(1.0, 30.0, N)
    (y, stats), gradient = jax.jit(
        lambda k: (solve(k), jax.grad(lambda k: jnp.sum(solve(k)[0]))(k))
    )(k)
    np.testing.assert_allclose(_fn(y, k), 0, atol=1e-7)
    a = np.asarray(A) + np.diag(3 * np.asarray(y) ** 2)
    np.testing.assert_allclose(gradient, np.linalg.solve(a.T, np.ones(N)), rtol=1e-6, atol=1e-9)
    values, _ = jax.jit(jax.vmap(solve))(jnp.stack([k, 9 * k]))
    np.testing.assert_allclose(values[0], y, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(_fn(values[1], 9 * k), 0, atol=1e-6)
    assert int(stats["num_steps"]) >= 3

"""The steady Brusselator: its equations against NumPy and an integrated reference, its roots."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from benchmarks.pde_ours import mean_reaction
from nksolve.problems import get
from nksolve.problems.brusselator import brusselator


def _by_loops(problem, y):
    """Node by node, from the definition."""
    n = y.shape[0]
    out = np.empty_like(y)
    a, b, alpha, source = (np.asarray(x) for x in problem.args)
    wrap = lambda k: k % n
    for i in range(n):
        for j in range(n):
            u, v = y[i, j]
            around = [(wrap(i - 1), j), (wrap(i + 1), j), (i, wrap(j - 1)), (i, wrap(j + 1))]
            laplacian = (sum(y[k] for k in around) - 4 * y[i, j]) * (n - 1) ** 2
            out[i, j, 0] = alpha * laplacian[0] + b + u * u * v - (a + 1) * u + source[i, j]
            out[i, j, 1] = alpha * laplacian[1] + a * u - u * u * v
    return out


def test_residual():
    problem = get("brusselator", n=7)
    y = np.random.default_rng(0).uniform(0.5, 3.0, (7, 7, 2))
    np.testing.assert_allclose(problem.fn(jnp.asarray(y), problem.args), _by_loops(problem, y))
    # The disc of radius 0.1 round (0.3, 0.6), x along the first axis.
    source = np.asarray(get("brusselator", n=11).args.source)
    assert {tuple(map(int, k)) for k in np.argwhere(source)} >= {(3, 6)}
    assert not source[6, 3] and set(np.unique(source)) == {0.0, 5.0}


def test_start():
    y0 = np.asarray(get("brusselator", n=5).y0)
    np.testing.assert_allclose(y0[:, 2, 0], 22 * 0.25**1.5)
    np.testing.assert_allclose(y0[2, :, 1], 27 * 0.25**1.5)
    np.testing.assert_allclose(y0[0, :, 1], 0)
    np.testing.assert_allclose(y0[:, 4, 0], 0)


def test_integrated_in_time_it_is_the_published_benchmark():
    """y' = F(y) to t = 11.5, the source from t = 1.1 on, on 8 × 8 nodes: ‖y‖₂ and max |y| of
    an independent program (Radau, rtol 1e-11)."""
    integrate = pytest.importorskip("scipy.integrate")
    problem, quiet = brusselator(8), brusselator(8, source=0.0)
    rate = jax.jit(lambda y, args: problem.fn(y.reshape(8, 8, 2), args).ravel())
    jacobian = jax.jit(jax.jacfwd(rate))
    y = np.asarray(problem.y0).ravel()
    for start, end, args in ((0.0, 1.1, quiet.args), (1.1, 11.5, problem.args)):
        y = integrate.solve_ivp(
            lambda t, y, a=args: np.asarray(rate(y, a)),
            (start, end),
            y,
            method="BDF",
            rtol=1e-8,
            atol=1e-9,
            jac=lambda t, y, a=args: np.asarray(jacobian(y, a)),
        ).y[:, -1]
    np.testing.assert_allclose(np.max(np.abs(y)), 5.221120544846924, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(y), 41.97857995988251, rtol=1e-5)


@ft.cache
def _solved(n, source):
    problem = brusselator(n, source=source)
    linear = nks.GMRES(preconditioner=nks.UserPreconditioner(mean_reaction))
    norm = lambda f: jnp.max(jnp.abs(f))
    solver = nks.NewtonKrylov(rtol=0.0, atol=1e-4, norm=norm, linear_solver=linear)
    run = jax.jit(lambda y, args: nks.root_find(problem.fn, solver, y, args, throw=False))
    return problem, run(problem.y0, problem.args)


@pytest.mark.parametrize("n", [16, 32])
def test_steady_state(n):
    """Solved without an assembled Jacobian, in as many steps on each grid."""
    problem, solution = _solved(n, 5.0)
    y = np.asarray(solution.value)
    assert np.max(np.abs(_by_loops(problem, y))) <= 1e-4
    assert int(solution.stats["num_steps"]) <= 4 and int(solution.stats["num_matvecs"]) <= 8
    # Sums over the periodic grid, where the Laplacian drops out.
    np.testing.assert_allclose(np.sum(y[..., 0]), n * n + np.sum(problem.args.source), atol=0.1)
    u, v = y[..., 0], y[..., 1]
    np.testing.assert_allclose(np.sum(3.4 * u - u * u * v), 0, atol=0.1)


def test_steady_state_by_a_dense_newton():
    problem, solution = _solved(16, 5.0)
    flat = lambda y: problem.fn(y.reshape(16, 16, 2), problem.args).ravel()
    y = jnp.ravel(problem.y0)
    jacobian = jax.jit(jax.jacfwd(flat))
    for _ in range(8):
        y = y - jnp.asarray(np.linalg.solve(jacobian(y), flat(y)))
    np.testing.assert_allclose(np.ravel(solution.value), y, atol=1e-5)


def test_preconditioner_is_the_inverse_where_the_reaction_is_uniform():
    problem = brusselator(12)
    y = jnp.broadcast_to(jnp.array([1.2, 2.5]), (12, 12, 2))
    solve = mean_reaction(None, y, problem.args)
    v = jnp.asarray(np.random.default_rng(0).standard_normal((12, 12, 2)))
    image = jax.jvp(lambda y: problem.fn(y, problem.args), (y,), (v,))[1]
    np.testing.assert_allclose(jax.jit(solve)(image), v, rtol=1e-9, atol=1e-9)


def test_without_source():
    problem = brusselator(9, source=0.0)
    np.testing.assert_allclose(problem.fn(problem.root, problem.args), 0, atol=1e-10)
    np.testing.assert_allclose(np.asarray(problem.root)[0, 0], [1.0, 3.4])
    with pytest.raises(ValueError, match="n must"):
        brusselator(2)

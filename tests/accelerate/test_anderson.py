"""Anderson: published and SciPy's counts, GMRES on linear problems, and histories gone bad."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
import scipy.optimize as so

import nksolve as nks
from nksolve import tree
from nksolve.accelerate.anderson import Anderson
from nksolve.accelerate.qr_window import AngleFilter, ConditionFilter, Window
from nksolve.problems.chandrasekhar import chandrasekhar
from tests.helpers import Counter

COUNTER = Counter()


def reason(solution):
    return nks.reason_name(solution.stats["reason"])


def cell(z, args):
    matrix, injection = args
    return jnp.tanh(z @ matrix + injection)


def parameters(size, rho, batch=None, dtype=jnp.float64):
    """A nearly symmetric matrix of norm ρ, and an injection small enough that ρ(∂g/∂z) is near."""
    rng = np.random.default_rng([size, round(100 * rho)])
    square = rng.standard_normal((size, size))
    matrix = (square + square.T) / 2 + 0.02 * (square - square.T) / 2
    matrix *= rho / np.linalg.norm(matrix, 2)
    shape = (size,) if batch is None else (batch, size)
    return jnp.asarray(matrix, dtype), jnp.asarray(0.01 * rng.standard_normal(shape), dtype)


@pytest.mark.parametrize("depth", range(1, 7))
def test_published_counts_for_the_h_equation(depth):
    published = (11, 10, 10, 11, 12, 12)[depth - 1]
    problem = chandrasekhar(512, 0.99)
    fn = lambda x, args: -problem.fn(x, args)  # the residual of the fixed point
    solution = nks.root_find(fn, Anderson(1e-8, 1e-8, depth=depth), problem.y0, problem.args)
    assert abs(int(solution.stats["num_fn_evals"]) - published) <= 1
    np.testing.assert_allclose(jnp.mean(solution.value), problem.published["mean"], rtol=1e-7)


# The functions of SciPy's own test of its nonlinear solvers, from their formulas.
_J0 = np.array([[-4.256, 14.7], [0.8394989, 0.59964207]])
_TRIDIAGONAL = np.array([[-2.0, 1, 0], [1, -2, 1], [0, 1, -2]])
SCIPY = {
    "cubic": (lambda x: -jnp.array([3, 2, 1.5, 1, 0.5]) * x - 0.01 * (x @ x) * x, [1.0] * 5),
    "identity": (lambda x: x, [1.0, 2, 3, 4, 5, 6]),
    "linear": (lambda x: jnp.asarray(_TRIDIAGONAL) @ x - jnp.array([1.0, 2, 3]), [1.0, 2, 3]),
    "powell": (
        lambda x: jnp.stack([1e4 * x[0] * x[1] - 1, jnp.sum(jnp.exp(-x)) - (1 + 1e-4)]),
        [-1.0, -2],
    ),
    "pressure network": (
        lambda x: jnp.append(0.5 * (x[1:] ** 2 - x[0] ** 2), jnp.sum(x) - 4),
        [2.0, 0, 2, 0],
    ),
    "nearly newton": (
        lambda x: (
            -jnp.asarray(np.linalg.inv(_J0))
            @ jnp.stack([(x[0] + 3) * (x[1] ** 5 - 7) + 18, jnp.sin(x[1] * jnp.exp(x[0]) - 1)])
        ),
        [-0.5, 1.4],
    ),
}


@pytest.mark.parametrize("name", SCIPY)
def test_no_more_evaluations_than_scipy(name):
    fn, start = SCIPY[name]
    start, evals = np.array(start), 0
    fast = jax.jit(fn)

    def counted(x):
        nonlocal evals
        evals += 1
        return np.asarray(fast(x))

    so.anderson(counted, start, f_tol=1e-2, maxiter=200)
    # SciPy's own choice of β, at the same depth.
    damping = 0.5 * max(np.linalg.norm(start), 1) / np.linalg.norm(fast(start))
    solver = Anderson(0.0, 1e-2, norm=tree.max_norm, damping=float(damping))
    solution = nks.root_find(lambda x, _: fn(x), solver, jnp.asarray(start))
    assert int(solution.stats["num_fn_evals"]) <= 1.2 * evals
    assert float(jnp.max(jnp.abs(fn(solution.value)))) <= 1e-2


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_gmres_on_a_linear_problem(damping):
    """F(x_{k+1}) = (I + βJ) r_k, with r_k the residual of k steps of GMRES (Walker & Ni 2011)."""
    n, depth = 24, 8
    rng = np.random.default_rng(3)
    jacobian = 0.9 * rng.standard_normal((n, n)) / np.sqrt(n) - np.eye(n)
    rhs = rng.standard_normal(n)
    solver = Anderson(0.0, 0.0, depth=depth, damping=damping, history_length=depth + 2)
    fn = lambda x, b: jnp.asarray(jacobian) @ x + b
    solution = nks.root_find(
        fn, solver, jnp.zeros(n), jnp.asarray(rhs), max_steps=depth + 1, throw=False
    )
    krylov, expected = [rhs], [np.linalg.norm(rhs)]
    for k in range(depth + 1):
        image = jacobian @ np.array(krylov[:k]).T if k else np.zeros((n, 1))
        r = rhs - image @ np.linalg.lstsq(image, rhs, rcond=None)[0]
        expected.append(np.linalg.norm(r + damping * jacobian @ r))
        krylov.append(jacobian @ krylov[-1] / np.linalg.norm(jacobian @ krylov[-1]))
    norms = solution.stats["history"].norm[: depth + 2]
    np.testing.assert_allclose(norms, expected, rtol=1e-8)


@functools.cache
def _append(filter):
    return jax.jit(lambda w, d, f: w.append(d, d, f, jnp.any(d != 0), filter))


@pytest.mark.parametrize(
    ("dtype", "spread", "tol"),
    [(np.float64, 1e-2, 1e-12), (np.float64, 1e-9, 1e-6), (np.float32, 1e-2, 1e-4)],
)
def test_the_window_solves_its_least_squares_problem(dtype, spread, tol):
    """Against LAPACK with all columns at once, over eight turns of the ring, with empty places."""
    n, m = 60, 5
    rng = np.random.default_rng(0)
    base = rng.standard_normal((n, 7)) * np.geomspace(1, spread, 7)
    window, columns, worst = Window.allocate(jnp.zeros(n, dtype), m), [], 0.0
    for k in range(8 * m):
        d = (0.8**k * base @ rng.standard_normal(7)).astype(dtype) * (k % 9 != 4)
        f = (0.8**k * rng.standard_normal(n)).astype(dtype)
        window, factor = _append(ConditionFilter(1e12 if dtype == np.float64 else None))(
            window, jnp.asarray(d), jnp.asarray(f)
        )
        columns = [d, *columns][:m]
        matrix = np.array([c for c in columns if np.any(c)], np.float64).T
        matrix = matrix / np.linalg.norm(matrix, axis=0)
        assert int(np.sum(factor.used)) == matrix.shape[1]
        exact = matrix @ np.linalg.lstsq(matrix, f.astype(np.float64), rcond=None)[0]
        ours = np.asarray(window.combine(factor.solution, jnp.asarray(f)), np.float64)
        worst = max(worst, np.linalg.norm(ours - exact) / np.linalg.norm(f))
    assert worst < tol


def test_filters_drop_what_they_say():
    n, rng = 40, np.random.default_rng(1)
    a, b, c = rng.standard_normal((3, n))
    near = a + 1e-4 * rng.standard_normal(n)  # nearly the oldest
    for filter, kept in (
        (ConditionFilter(1e2), [True, True, True, False, False]),
        (ConditionFilter(1e6), [True, True, True, True, False]),
        (AngleFilter(0.1), [True, True, True, False, False]),
    ):
        window = Window.allocate(jnp.zeros(n), 5)
        for d in (a, b, c, near):
            window, factor = _append(filter)(window, jnp.asarray(d), jnp.ones(n))
        assert factor.used.tolist() == kept
    # An old column that is dropped takes none between with it, where angles decide.
    window = Window.allocate(jnp.zeros(n), 5)
    for d in (b, a, near, c):
        window, factor = _append(AngleFilter(0.1))(window, jnp.asarray(d), jnp.ones(n))
    assert factor.used.tolist() == [True, True, False, True, False]
    matrix = np.stack([c, near, b], 1)
    exact = matrix @ np.linalg.lstsq(matrix, np.ones(n), rcond=None)[0]
    ours = window.combine(factor.solution, jnp.ones(n))
    np.testing.assert_allclose(ours, exact, rtol=1e-10, atol=1e-12)


@eqx.filter_jit
def layer(solver, z0, args):
    return nks.fixed_point(cell, solver, z0, args, max_steps=400, throw=False)


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float64, 1e-10), (jnp.float32, 1e-6)])
def test_cells(dtype, rtol):
    steps = []
    for rho in (0.5, 0.9, 0.99):
        args = parameters(32, rho, batch=4, dtype=dtype)
        solver = Anderson(jnp.asarray(rtol, dtype), jnp.asarray(0, dtype))
        solution = layer(solver, jnp.zeros((4, 32), dtype), args)
        assert reason(solution) == "residual_rtol"
        z, (matrix, injection) = solution.value, args
        exact = np.asarray(z, np.float64)
        for _ in range(4000):
            exact = np.tanh(exact @ np.asarray(matrix, np.float64) + np.asarray(injection))
        np.testing.assert_allclose(z, exact, atol=100 * rtol * np.linalg.norm(injection))
        steps.append(int(solution.stats["num_steps"]))
    # Picard takes 1887 and more than 1000 at ρ = 0.99.
    assert steps[0] < steps[1] < steps[2] < (135 if dtype == jnp.float64 else 80)


def test_unusable_differences_are_dropped():
    # β = 0: no point differs from the first.
    still = nks.root_find(
        lambda x, _: 1 - x, Anderson(1e-8, 0.0, damping=0.0), jnp.zeros(3), throw=False
    )
    assert reason(still) == "stagnated" and bool(jnp.all(still.value == 0))
    # Every difference is parallel to the first one, and there are more of them than unknowns.
    one = nks.root_find(
        lambda x, _: 2 - x - 0.3 * jnp.sin(x), Anderson(1e-13, 0.0, depth=4), jnp.zeros(1)
    )
    exact = so.brentq(lambda x: 2 - x - 0.3 * np.sin(x), 0, 3, xtol=1e-14)
    np.testing.assert_allclose(one.value, exact, rtol=1e-12)
    copies = nks.root_find(
        lambda x, _: 2 - x - 0.3 * jnp.sin(x), Anderson(1e-13, 0.0), jnp.zeros(7)
    )
    np.testing.assert_allclose(copies.value, exact, rtol=1e-12)
    assert int(copies.stats["num_dropped"]) > 0
    # A trial with NaN is halved until it has none, and is not remembered.
    fn = lambda x, _: jnp.where(x > 3.0, jnp.nan, 2 - x)
    nan = nks.root_find(fn, Anderson(1e-12, 0.0, damping=4.0), jnp.zeros(3))
    assert int(nan.stats["num_rejected_steps"]) > 0
    np.testing.assert_allclose(nan.value, 2, rtol=1e-12)
    first = nks.root_find(lambda x, _: x * jnp.nan, Anderson(1e-8, 0.0), jnp.ones(2), throw=False)
    assert reason(first) == "nonfinite"


def test_pytrees_complex_leaves_and_maps_that_are_not_holomorphic():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 6, 6)) / 5
    shift = jnp.asarray(rng.standard_normal(6) + 1j * rng.standard_normal(6))

    def fn(y, _):
        z, t = y["z"], y["t"]
        mixed = jnp.asarray(a + 0j) @ z + jnp.asarray(1j * b) @ z.conj() + shift
        return {"z": mixed, "t": jnp.cos(t) * 0.5 + jnp.sum(z.real) * 0.01, "none": None}

    y0 = {"z": jnp.zeros(6, complex), "t": jnp.zeros((2, 1)), "none": None}
    solution = nks.fixed_point(fn, Anderson(1e-11, 0.0, depth=8), y0)
    x = np.linalg.solve(
        np.eye(12) - np.block([[a, b], [b, a]]), np.r_[np.real(shift), np.imag(shift)]
    )
    np.testing.assert_allclose(solution.value["z"], x[:6] + 1j * x[6:], rtol=1e-9)
    assert int(solution.stats["num_steps"]) <= 30


def test_lanes_stop_by_themselves():
    matrix, injection = parameters(16, 0.95, batch=4)
    injection = injection * jnp.array([[1e-6], [1.0], [30.0], [200.0]])
    solver = Anderson(1e-9, 0.0, delay=1)
    run = lambda b: (lambda s: (s.value, s.stats))(
        nks.fixed_point(cell, solver, jnp.zeros(16), (matrix, b), max_steps=200)
    )
    values, stats = jax.jit(jax.vmap(run))(injection)
    alone = jax.jit(run)
    assert len(set(stats["num_steps"].tolist())) > 1
    for i in range(4):
        value, lone = alone(injection[i])
        np.testing.assert_allclose(values[i], value, rtol=1e-8, atol=1e-14)
        for name in ("num_steps", "num_fn_evals", "num_dropped"):
            assert int(stats[name][i]) == int(lone[name]), name


def test_derivatives_and_counters():
    args = parameters(12, 0.8)
    counted = lambda z, args: cell(COUNTER.tick(z), args)
    solver = Anderson(1e-13, 0.0, linear_solver=nks.GMRES(1e-13, 0.0))
    solve = lambda args: nks.fixed_point(counted, solver, jnp.zeros(12), args)
    solution = solve(args)
    weights = jnp.arange(12.0)
    loss = jax.jit(lambda args: weights @ solve(args).value)
    ahead = jnp.asarray(np.random.default_rng(0).standard_normal(12))
    grad = jax.jit(jax.grad(loss))(args)[1]
    _, tangent = jax.jvp(loss, (args,), ((jnp.zeros((12, 12)), ahead),))
    slope = 1 - np.asarray(solution.value) ** 2
    jacobian = slope[:, None] * np.asarray(args[0]).T
    dense = slope * np.linalg.solve(np.eye(12) - jacobian.T, weights)
    np.testing.assert_allclose(grad, dense, rtol=1e-9)
    np.testing.assert_allclose(tangent, dense @ ahead, rtol=1e-9)
    with COUNTER.measure() as count:
        stats = solve(args).stats
    assert count.primal == int(stats["num_fn_evals"]) == int(stats["num_steps"]) + 1
    assert count.tangent == count.transposed == 0


def test_optimistix_takes_it_for_fixed_points():
    args = parameters(12, 0.8)
    ours = nks.fixed_point(cell, Anderson(1e-12, 0.0), jnp.zeros(12), args)
    theirs = optx.fixed_point(cell, Anderson(1e-12, 0.0), jnp.zeros(12), args)
    np.testing.assert_allclose(theirs.value, ours.value, rtol=1e-9)


def test_bad_arguments():
    with pytest.raises(ValueError, match="depth"):
        Anderson(1e-6, 0.0, depth=0)
    with pytest.raises(ValueError, match="delay"):
        Anderson(1e-6, 0.0, delay=-1)
    with pytest.raises(ValueError, match="rtol"):
        Anderson(-1.0, 0.0)
    with pytest.raises(TypeError, match="filter"):
        Anderson(1e-6, 0.0, filter=1e8)  # pyright: ignore
    with pytest.raises(ValueError, match="limit"):
        ConditionFilter(0.5)
    with pytest.raises(ValueError, match="sine"):
        AngleFilter(1.5)

"""Complementarity problems by semismooth Newton methods, against enumeration and PETSc."""

import functools as ft
import importlib
import itertools as it
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.newton.globalisation.feasible import Feasible
from nksolve.problems.obstacle import obstacle, obstacle_force, obstacle_residual
from nksolve.verbs.complementarity import FischerBurmeister, Mid, complementarity
from tests.helpers.counting import Counter
from tests.newton.solving import counters, reason, rows, run

FUNCTIONS = [Mid(), FischerBurmeister()]
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: type(f).__name__)

# --- the functions -----------------------------------------------------------------------------


def violation(y, f, lower, upper):
    """How far from complementary: the natural residual in NumPy."""
    return np.abs(y - np.minimum(np.maximum(y - f, lower), upper))


@pytest.mark.parametrize("function", [Mid(), Mid(0.1), FischerBurmeister(), FischerBurmeister(7.0)])
def test_zero_where_complementary_and_only_there(function):
    inf = np.inf
    values = np.array([-2.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 2.0])
    y, f = (x.ravel() for x in np.meshgrid(values, values))
    for lower, upper in ((-1.0, 1.0), (-1.0, inf), (-inf, 1.0), (-inf, inf), (0.0, 0.0)):
        phi = function(jnp.asarray(y), jnp.asarray(f), jnp.asarray(lower), jnp.asarray(upper))
        zero = violation(y, f, lower, upper) == 0
        assert np.all(np.isfinite(phi))
        assert zero.sum() >= 7
        np.testing.assert_allclose(phi[zero], 0, atol=1e-14)
        assert np.all(np.abs(phi[~zero]) > 1e-5)
        if np.isinf(lower) and np.isinf(upper):
            np.testing.assert_allclose(phi, f, rtol=1e-14)


def test_mid_is_the_projection():
    rng = np.random.default_rng(2)
    y, f, low, high = rng.standard_normal((4, 500))
    lower, upper = np.minimum(low, high), np.maximum(low, high)
    for c in (1.0, 0.3):
        wanted = (y - np.minimum(np.maximum(y - c * f, lower), upper)) / c
        got = Mid(c)(*(jnp.asarray(x) for x in (y, f, lower, upper)))
        np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-13)


def test_fischer_burmeister_is_its_formula():
    rng = np.random.default_rng(3)
    y, f, low, high = rng.standard_normal((4, 500))
    lower, upper = np.minimum(low, high), np.maximum(low, high)
    phi = lambda a, b: a + b - np.sqrt(a * a + b * b)
    for c in (1.0, 0.3):
        wanted = phi(y - lower, -phi(upper - y, -c * f)) / c
        got = FischerBurmeister(c)(*(jnp.asarray(x) for x in (y, f, lower, upper)))
        np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["f32", "f64"])
def test_fischer_burmeister_to_the_last_digits(dtype):
    """φ(a, b) ≈ b − b²/2a for b ≪ a: no cancellation, no overflow, no underflow."""
    big = 1e30 if dtype == jnp.float32 else 1e200
    one, inf = jnp.ones((), dtype), jnp.asarray(jnp.inf, dtype)
    function = jax.jit(lambda y, f: FischerBurmeister()(y, f, 0 * one, inf))
    slopes = jax.jit(jax.grad(lambda y, f: FischerBurmeister()(y, f, 0 * one, inf), argnums=(0, 1)))
    for y, f in ((1.0, 1e-7), (big, 1.0), (big, big), (1 / big, 1 / big), (0.0, 1 / big)):
        got = float(function(jnp.asarray(y, dtype), jnp.asarray(f, dtype)))
        a, b = float(jnp.asarray(y, dtype)), float(jnp.asarray(f, dtype))
        wanted = 2 * a * (b / (a + b + np.hypot(a, b)))
        np.testing.assert_allclose(got, wanted, rtol=4 * np.finfo(dtype).eps)
        da, db = slopes(jnp.asarray(y, dtype), jnp.asarray(f, dtype))
        radius = np.hypot(a, b)
        tolerance = 4 * np.finfo(dtype).eps
        np.testing.assert_allclose([da, db], [1 - a / radius, 1 - b / radius], atol=tolerance)


def slopes(function, y, f, lower, upper):
    """(∂Φ/∂y, ∂Φ/∂f)."""
    arrays = [jnp.asarray(x, float) for x in (y, f, lower, upper)]
    return tuple(float(s) for s in jax.grad(function, argnums=(0, 1))(*arrays))


def test_derivatives_at_kinks_are_limits_of_derivatives():
    inf = np.inf
    for y, f, lower, upper in (
        (0.0, 0.0, 0.0, inf),  # the corner
        (1.0, 1.0, 0.0, inf),  # y − l = f: on the diagonal
        (0.0, 0.0, -inf, 0.0),
        (-1.0, -1.0, -inf, 0.0),
        (0.5, 0.5, 0.0, 1.0),
        (0.0, 0.0, 0.0, 0.0),
    ):
        # Identity row or row of J, never half of each.
        assert slopes(Mid(), y, f, lower, upper) in {(1.0, 0.0), (0.0, 1.0)}
    assert slopes(Mid(0.25), 0.0, 0.0, 0.0, inf) == (4.0, 0.0)
    da, db = slopes(FischerBurmeister(), 0.0, 0.0, 0.0, inf)
    np.testing.assert_allclose((1 - da) ** 2 + (1 - db) ** 2, 1.0)
    near = slopes(FischerBurmeister(), 1e-12, 1e-12, 0.0, inf)
    np.testing.assert_allclose((da, db), near, rtol=1e-12)
    # Second derivatives near the kink are those of the formula.
    h = jax.grad(jax.grad(lambda y: FischerBurmeister()(y, 0.5 * y + 1.0, 0.0 * y, y + jnp.inf)))
    np.testing.assert_allclose(h(0.7), _second(0.7), rtol=1e-6)


def _second(y, h=1e-4):
    phi = lambda y: y + 0.5 * y + 1 - np.sqrt(y**2 + (0.5 * y + 1) ** 2)
    return (phi(y + h) - 2 * phi(y) + phi(y - h)) / h**2


def test_nothing_is_hidden():
    """f = ∞ and NaN at an active bound stay what they are."""
    zero = jnp.zeros(())
    for function in FUNCTIONS:
        for f in (jnp.inf, -jnp.inf, jnp.nan):
            assert not np.isfinite(function(zero, jnp.asarray(f), zero, zero + 1))


# --- small problems, against enumeration -------------------------------------------------------


def enumerated(matrix, q, lower, upper):
    """The solution of f = A y + q in the box, by trying each of the 3ⁿ active sets."""
    n = len(q)
    for sides in it.product((-1, 0, 1), repeat=n):
        sides = np.array(sides)
        y = np.where(sides < 0, lower, upper)
        free = sides == 0
        if free.any():
            rhs = -(q + matrix[:, ~free] @ y[~free])[free]
            y[free] = np.linalg.solve(matrix[np.ix_(free, free)], rhs)
        f = matrix @ y + q
        if np.all(violation(y, f, lower, upper) < 1e-10):
            return y
    raise AssertionError("no solution")


def affine(y, args):
    return args[0] @ y + args[1]


@ft.cache
def affine_solver(function):
    @jax.jit
    def solve(matrix, q, lower, upper):
        fn = complementarity(affine, lower, upper, function)
        search = Feasible(lower=lower, upper=upper)
        solver = nks.NewtonKrylov(0.0, 1e-11, linear_solver=nks.DenseDirect(), globalisation=search)
        y0 = 0.5 * (lower + upper)
        return nks.root_find(fn, solver, y0, (matrix, q), max_steps=60)

    return solve


@each_function
def test_affine_problems(function):
    """Random positive definite, nonsymmetric ones: the unique solution, in few steps."""
    rng = np.random.default_rng(4)
    steps, active = [], 0
    for _ in range(12):
        n = 4
        matrix = rng.standard_normal((n, n))
        matrix = matrix @ matrix.T / n + np.eye(n) + 0.3 * (matrix - matrix.T)
        q = 3 * rng.standard_normal(n)
        lower, upper = -rng.uniform(0.1, 1, n), rng.uniform(0.1, 1, n)
        wanted = enumerated(matrix, q, lower, upper)
        solution = affine_solver(function)(*map(jnp.asarray, (matrix, q, lower, upper)))
        np.testing.assert_allclose(solution.value, wanted, atol=1e-9)
        steps.append(int(solution.stats["num_steps"]))
        active += np.sum((wanted == lower) | (wanted == upper))
    assert 10 < active < 40
    assert max(steps) <= (8 if isinstance(function, Mid) else 25)


@each_function
def test_derivatives_against_differences(function):
    """With respect to the matrix, q and both bounds, at a strictly complementary solution."""
    matrix = jnp.array([[3.0, 1.0, 0.2], [-0.5, 2.0, 0.4], [0.3, 0.1, 4.0]])
    q, lower, upper = jnp.array([5.0, -9.0, 1.0]), jnp.full(3, -1.0), jnp.full(3, 2.0)
    solve = affine_solver(function)
    value = lambda *point: solve(*point).value
    point = matrix, q, lower, upper
    f = affine(value(*point), (matrix, q))
    assert f[0] > 1 and f[1] < -1 and abs(f[2]) < 1e-9  # one of each kind
    weight = jnp.array([1.0, -2.0, 0.7])
    rng = np.random.default_rng(5)
    moved = tuple(jnp.asarray(rng.standard_normal(x.shape)) for x in point)
    h = 1e-5
    plus, minus = (
        value(*(x + sign * h * d for x, d in zip(point, moved, strict=True))) for sign in (1, -1)
    )
    wanted = (plus - minus) / (2 * h)

    @jax.jit
    def both(point, moved):
        loss = lambda *p: weight @ value(*p)
        return jax.jvp(value, point, moved)[1], jax.grad(loss, argnums=(0, 1, 2, 3))(*point)

    forward, gradient = both(point, moved)
    np.testing.assert_allclose(forward, wanted, rtol=1e-7, atol=1e-9)
    dotted = sum(jnp.vdot(g, d) for g, d in zip(gradient, moved, strict=True))
    np.testing.assert_allclose(dotted, weight @ forward, rtol=1e-9)


def test_a_nonlinear_problem_and_second_derivatives():
    """f = eʸ − a on [0, 1]: y = clip(log a), and its derivatives; with the function that is curved
    itself."""

    def solve(a):
        fn = complementarity(lambda y, a: jnp.exp(y) - a, 0.0, 1.0, FischerBurmeister())
        search = Feasible(lower=0.0, upper=1.0)
        solver = nks.NewtonKrylov(0.0, 1e-12, globalisation=search)
        return nks.root_find(fn, solver, jnp.full(4, 0.5), a, max_steps=60).value

    @jax.jit
    def orders(a):
        gradient = jax.grad(lambda a: jnp.sum(solve(a)))
        return solve(a), *jax.jvp(gradient, (a,), (jnp.ones(4),))

    a = jnp.array([0.5, 1.5, 2.0, 4.0])
    value, first, second = orders(a)
    inside = np.array([0.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(value, np.clip(np.log(a), 0, 1), atol=1e-11)
    np.testing.assert_allclose(first, inside / a, atol=1e-9)
    np.testing.assert_allclose(second, -inside / a**2, atol=1e-8)


def test_degenerate():
    """f = 0 on the bound, not strictly complementary: still solved, Φ has a kink at the root."""
    q = jnp.array([0.0, 1.0])
    for function in FUNCTIONS:
        fn = complementarity(lambda y, q: y + y**2 + q, 0.0, None, function)
        solution = run(fn, nks.NewtonKrylov(0.0, 1e-10), jnp.ones(2), q, max_steps=60)
        assert reason(solution) == "residual_atol"
        np.testing.assert_allclose(solution.value, 0, atol=1e-9)


# --- trees, lanes, counts, errors --------------------------------------------------------------


@each_function
def test_trees_lanes_precision_and_aux(function):
    def fn(y, a):
        u, v = y["u"], y["v"]
        return {"u": 2 * u + 0.5 * v[0] - a, "v": v - 0.25 * u[:1] + a}, jnp.sum(u)

    lower, upper = {"u": 0.0, "v": jnp.full(1, -1.0)}, {"u": jnp.array([1.0, 2.0, 0.5]), "v": None}
    residual = complementarity(fn, lower, upper, function, has_aux=True)
    y0 = {"u": jnp.full(3, 0.5, jnp.float32), "v": jnp.zeros(1, jnp.float32)}
    solver = nks.NewtonKrylov(0.0, 2e-6, globalisation=Feasible(lower=lower, upper=upper))
    solve = lambda a: run(residual, solver, y0, a, has_aux=True, max_steps=60)
    many = jnp.array([-1.0, 0.5, 1.5, 9.0], jnp.float32)
    batch = jax.jit(jax.vmap(solve))(many)
    for k, a in enumerate(many):
        u, v = np.asarray(batch.value["u"][k]), np.asarray(batch.value["v"][k])
        assert u.dtype == v.dtype == np.float32
        f, _ = fn({"u": u, "v": v}, float(a))
        for x, g, low, high in ((u, f["u"], 0.0, upper["u"]), (v, f["v"], -1.0, np.inf)):
            assert np.all(violation(x, g, low, high) < 1e-5)
        np.testing.assert_allclose(batch.aux[k], u.sum(), rtol=1e-6)
    alone = solve(many[2])
    assert counters(alone) == {k: int(v[2]) for k, v in batch.stats.items() if k[:4] == "num_"}
    for key, value in alone.value.items():
        np.testing.assert_allclose(value, batch.value[key][2], rtol=1e-5, atol=1e-6)


def test_one_evaluation_for_each_trial():
    counter = Counter()

    def fn(y, a):
        return counter.tick(y) ** 3 + y - a

    residual = complementarity(fn, 0.0, 1.0)
    solver = nks.NewtonKrylov(0.0, 1e-10, globalisation=Feasible(lower=0.0, upper=1.0))
    with counter.measure() as count:
        solution = run(residual, solver, jnp.full(3, 0.5), jnp.array([-1.0, 0.7, 5.0]))
        jax.block_until_ready(solution.value)
    assert reason(solution) == "residual_atol"
    made = counters(solution)
    assert count.primal == 1 + made["num_steps"] + made["num_rejected_steps"]
    assert count.tangent == made["num_matvecs"]


def test_errors():
    with pytest.raises(ValueError, match="must not exceed"):
        complementarity(affine, 1.0, jnp.array([2.0, 0.0]))
    for function in (Mid, FischerBurmeister):
        with pytest.raises(ValueError, match="positive"):
            function(0.0)
    y = jnp.zeros(3)
    with pytest.raises(ValueError, match="one equation for each unknown"):
        complementarity(lambda y, a: y[:2], 0.0, None)(y, None)
    with pytest.raises(ValueError, match="has the shape"):
        complementarity(lambda y, a: y, jnp.zeros(2), None)(y, None)
    with pytest.raises(TypeError, match="complex"):
        complementarity(lambda y, a: y, 0.0, None)(y.astype(complex), None)


# --- the obstacle problem ----------------------------------------------------------------------


def relaxed(problem, tolerance):
    """The solution by projected Gauss–Seidel with over-relaxation, in NumPy."""
    psi, boundary = np.asarray(problem.args.obstacle), np.asarray(problem.args.boundary)
    u = np.array(boundary)
    n = len(u)
    u[1:-1, 1:-1] = np.asarray(problem.y0)[1:-1, 1:-1]
    omega = 2 / (1 + np.sin(np.pi / (n - 1)))
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    inner = (i > 0) & (i < n - 1) & (j > 0) & (j < n - 1)
    for _ in range(20 * n):
        before = u.copy()
        for colour in (0, 1):
            chosen = inner & ((i + j) % 2 == colour)
            means = np.zeros_like(u)
            means[1:-1, 1:-1] = u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:]
            relaxed = np.maximum(u + omega * (means / 4 - u), psi)
            u = np.where(chosen, relaxed, u)
        if np.max(np.abs(u - before)) < tolerance:
            return u
    raise AssertionError("no convergence")


def solved(problem, function: Any = FUNCTIONS[0], linear_solver=None, eta=1e-5):
    lower, upper = problem.bounds
    fn = complementarity(obstacle_force, lower, upper, function)
    solver = nks.NewtonKrylov(
        0.0,
        1e-10,
        linear_solver=linear_solver or nks.GMRES(),
        forcing=nks.ConstantForcing(eta),
        globalisation=Feasible(lower=lower, upper=upper),
        history_length=60,
    )
    return run(fn, solver, problem.y0, problem.args, max_steps=40)


def test_the_obstacle_problem_as_petsc_solves_it():
    """From 0 projected onto ψ in 3 steps; norms and both errors as printed by ex9."""
    problem = obstacle(9)
    solution = solved(problem)
    assert reason(solution) == "residual_atol"
    norms, published = rows(solution)["norm"], problem.published["norms"]
    assert counters(solution)["num_steps"] <= 3
    np.testing.assert_allclose(norms[:2], published[:2], rtol=2e-5)
    assert norms[-1] < 1e-10
    error = np.abs(solution.value - problem.continuum)
    assert f"{error.mean():.3e}" == f"{problem.published['average_error']:.3e}"
    assert f"{error.max():.3e}" == f"{problem.published['largest_error']:.3e}"
    np.testing.assert_allclose(solution.value, relaxed(problem, 1e-13), atol=1e-10)
    assert np.all(solution.value >= problem.args.obstacle)


def test_the_residual_of_the_problem_is_that_of_the_verb():
    problem = obstacle(9)
    lower, upper = problem.bounds or (None, None)
    made = complementarity(obstacle_force, lower, upper)
    for u in (problem.y0, problem.continuum, problem.args.obstacle):
        got, wanted = problem.fn(u, problem.args), made(u, problem.args)
        np.testing.assert_array_equal(got, wanted)
        pushed = [
            jax.jvp(lambda u, f=f: f(u, problem.args), (u,), (u,))[1] for f in (made, problem.fn)
        ]
        np.testing.assert_array_equal(*pushed)
    assert problem.fn is obstacle_residual


@pytest.mark.parametrize("n", [17, 33])
def test_finer_obstacle_problems(n):
    """GMRES with a preconditioner that is made anew for each active set."""
    problem = obstacle(n)
    solution = solved(problem, linear_solver=nks.GMRES(preconditioner=nks.SparseLU()))
    assert reason(solution) == "residual_atol"
    assert counters(solution)["num_steps"] <= 10
    np.testing.assert_allclose(solution.value, relaxed(problem, 1e-12), atol=1e-9)
    error = np.abs(solution.value - problem.continuum)
    # Not of second order: it depends on how the nodes lie about the free boundary.
    assert error.mean() < {17: 2.71e-3, 33: 8.2e-4}[n]


def test_the_obstacle_problem_by_fischer_burmeister():
    problem = obstacle(9)
    solution = solved(problem, FischerBurmeister(0.25))
    assert reason(solution) == "residual_atol"
    np.testing.assert_allclose(solution.value, relaxed(problem, 1e-13), atol=1e-9)


def test_the_exact_solution_touches_the_obstacle_smoothly():
    """The constants: u and u' agree with ψ and ψ' at the free boundary, and u(2) = 0."""
    module = importlib.import_module("nksolve.problems.obstacle")
    a, big = module.FREE_RADIUS, module._A
    np.testing.assert_allclose(a**2 * (np.log(2) - np.log(a)), 1 - a**2, rtol=1e-13)
    np.testing.assert_allclose(big, a**2 / np.sqrt(1 - a**2), rtol=1e-13)
    np.testing.assert_allclose(module._membrane(np.array(a + 1e-12)), np.sqrt(1 - a**2), atol=1e-11)
    np.testing.assert_allclose(module._membrane(np.array(2.0)), 0, atol=1e-14)
    with pytest.raises(ValueError, match="n must be"):
        obstacle(2)

"""Box constraints: no point outside is ever evaluated, and success is that of the residual test.

Residuals here are NaN outside of the box, so that a row of the history that is not finite shows a
point that should not have been evaluated.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve.newton.globalisation.bending import Interior, Projected, ProjectedDescent, Shortened
from nksolve.newton.globalisation.box import (
    Box,
    box,
    contains,
    largest_factor,
    projected,
    step_inside,
)
from nksolve.newton.globalisation.feasible import Feasible
from nksolve.newton.state import Direction
from nksolve.problems import get

from .solving import assert_honest, counters, reason, rows, run

BENDINGS = [Projected(), ProjectedDescent(), Interior(), Shortened()]
each_bending = pytest.mark.parametrize("bending", BENDINGS, ids=lambda b: type(b).__name__)


@ft.cache
def walled(fn):
    """fn, which is NaN outside of the box in args."""

    def inside(y, args):
        args, lower, upper = args
        return jnp.where(contains(Box(lower, upper), y), fn(y, args), jnp.nan)

    return inside


# --- the box -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["f32", "f64"])
def test_steps_end_inside_to_the_last_bit(dtype):
    """Of every scale, from inside and from outside: y + s as it is rounded lies in the box."""
    rng = np.random.default_rng(0)
    n = 4000

    def wild():
        return rng.choice([-1.0, 1.0], n) * 10.0 ** rng.uniform(-20, 20, n)

    @jax.jit
    def reached(y, s, lower, upper):
        # As a solver does it, with a product that a compiler may contract with the sum.
        step = step_inside(Box(lower, upper), y, 0.3 * s)
        return y + step

    inside = 0
    for kind in range(4):
        bounds = np.sort([wild(), wild()], axis=0)
        if kind in (1, 3):  # narrow, for their place
            bounds[1] = bounds[0] + np.abs(bounds[0]) * 10.0 ** rng.uniform(-6, 0, n)
        if kind == 2:  # one-sided
            bounds[1] = np.inf
        lower, upper = (jnp.asarray(b, dtype) for b in bounds)
        mixed = rng.uniform(0, 1, n) * np.minimum(bounds[1], 1e25) + wild()
        y, s = jnp.asarray(mixed, dtype), jnp.asarray(wild(), dtype)
        y = jnp.clip(y, lower, upper)
        if kind == 3:  # from outside
            y = lower + jnp.asarray(rng.uniform(-5, 5, n), dtype) * (upper - lower)
        got = reached(y, s, lower, upper)
        assert got.dtype == dtype
        assert np.all((lower <= got) & (got <= upper))
        free = np.asarray((lower < y + s) & (y + s < upper))
        inside += free.sum()
        exact = np.clip(y + jnp.asarray(0.3, dtype) * s, lower, upper)
        size = np.abs(y) + np.abs(exact)
        assert np.all(np.abs(got - exact) <= 4 * np.finfo(dtype).eps * size)
    assert inside > n / 10  # steps that no bound touches are among them
    assert np.all(jnp.isinf(s + jnp.inf))
    everywhere = Box(jnp.asarray(-jnp.inf, dtype), jnp.asarray(jnp.inf, dtype))
    np.testing.assert_array_equal(step_inside(everywhere, y, -y), -y)


def test_the_largest_factor_against_one_found_by_trying():
    rng = np.random.default_rng(1)
    for _ in range(20):
        lower, upper = np.sort(rng.standard_normal((2, 7)), axis=0)
        y, d = rng.uniform(lower, upper), 3 * rng.standard_normal(7)
        y[0], d[0] = upper[0], 1.0  # on its bound, and out of it: not counted
        d[1] = 0.0
        low, high = 0.0, 1e6
        for _ in range(200):
            t = 0.5 * (low + high)
            fits = np.all((lower <= y + t * d) & (y + t * d <= upper), where=np.arange(7) > 0)
            low, high = (t, high) if fits else (low, t)
        made = Box(jnp.asarray(lower), jnp.asarray(upper))
        got = largest_factor(made, jnp.asarray(y), jnp.asarray(d))
        np.testing.assert_allclose(got, low, rtol=1e-12)
    free = Box(jnp.asarray(-jnp.inf), jnp.asarray(jnp.inf))
    assert np.isinf(largest_factor(free, jnp.asarray(y), jnp.asarray(d)))
    assert np.isinf(largest_factor(Box({}, {}), {}, {}))


def test_prefixes():
    y = {"u": jnp.zeros((2, 3)), "v": [jnp.zeros(4), jnp.zeros((), jnp.float32)]}
    made = box({"u": jnp.arange(3.0), "v": None}, 7.0, y)
    assert jax.tree.structure(made.lower) == jax.tree.structure(made.upper) == jax.tree.structure(y)
    np.testing.assert_array_equal(made.lower["u"], np.tile(np.arange(3.0), (2, 1)))
    assert made.lower["v"][0] == -np.inf and made.lower["v"][1].dtype == jnp.float32
    assert made.upper["u"] == 7.0 and made.upper["v"][1] == 7.0
    np.testing.assert_array_equal(projected(made, y)["u"], made.lower["u"])
    np.testing.assert_array_equal(projected(made, y)["v"][1], 0.0)
    trees = {"u": 0.0, "v": [0.0]}
    for lower, error, match in (
        (jnp.zeros(5), ValueError, "has the shape"),
        ({"u": 0.0}, ValueError, "must be a prefix of y"),
        (trees, ValueError, "must be a prefix of y"),
        (1j, TypeError, "complex"),
    ):
        with pytest.raises(error, match=match):
            box(lower, None, y)
    with pytest.raises(TypeError, match="complex"):
        box(0.0, None, jnp.zeros(2, complex))


def test_bad_arguments():
    for lower, upper in (
        (1.0, 0.0),
        (float("nan"), 1.0),
        (jnp.array([0.0, 2.0]), 1.0),
        ({"u": 0.0, "v": 3.0}, {"u": 1.0, "v": jnp.array([4.0, 2.0])}),
        ({"u": 0.0, "v": [3.0, None]}, 2.0),
        (1.0, ({"u": 2.0}, 0.5)),
    ):
        with pytest.raises(ValueError, match="must not exceed"):
            Feasible(lower=lower, upper=upper)
    Feasible(lower={"u": 0.0, "v": None}, upper=1.0)
    Feasible(lower=None, upper={"u": 0.0})
    with pytest.raises(Exception, match="globalisation"):
        Feasible(0.0, 1.0)  # pyright: ignore[reportArgumentType]
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="fraction"):
            Shortened(fraction)
    with pytest.raises(ValueError, match="Hookstep"):  # what the other refuses is refused
        nks.NewtonKrylov(1e-6, 1e-6, linear_solver=nks.CG(), globalisation=Feasible(nks.Hookstep()))


# --- batches of starts -------------------------------------------------------------------------


@ft.cache
def solver_of(name, bending):
    """Solves a problem from a batch of starts, with a wall around its box; `None` without bounds.
    The box is that of the other arguments."""
    problem = get(name)

    @jax.jit
    def solve(starts, lower, upper):
        search = nks.Backtracking()
        if bending is not None:
            search = Feasible(search, lower, upper, bending)
        solver = nks.NewtonKrylov(
            0.0, 1e-11, globalisation=search, linear_solver=nks.DenseDirect(), history_length=64
        )
        fn = walled(problem.fn)
        one = lambda y0: run(fn, solver, y0, (None, lower, upper), max_steps=60)
        return jax.vmap(one)(starts)

    return solve


def lane(solution, k):
    return jax.tree.map(lambda x: x[k] if eqx.is_array(x) else x, solution)


def test_ferraris_tronconi():
    """KINSOL's roots from KINSOL's starts, and no point outside of the box on the way, from a grid
    of starts either; unconstrained Newton leaves it from many."""
    problems = [get("ferraris-tronconi", start=start) for start in ("lower", "middle")]
    lower, upper = problems[0].bounds
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 7), np.linspace(0, 1, 7)), -1).reshape(-1, 2)
    grid = np.asarray(lower) + grid * np.asarray(upper - lower)
    starts = jnp.concatenate([jnp.stack([p.y0 for p in problems]), jnp.asarray(grid)])
    for bending in (None, *BENDINGS):
        solutions, left = solver_of("ferraris-tronconi", bending)(starts, lower, upper), 0
        made = [lane(solutions, k) for k in range(len(starts))]
        for solution in made:
            left += not np.all(np.isfinite(rows(solution)["norm"]))
            assert np.all((lower <= solution.value) & (solution.value <= upper))
            succeeded = reason(solution).startswith("residual")
            assert succeeded == (float(solution.stats["residual_norm"]) <= 1e-11)
        assert left == 0 if bending is not None else left > 5
        for problem, solution in zip(problems, made[:2], strict=True):
            assert reason(solution) == "residual_atol"
            np.testing.assert_allclose(solution.value, problem.published["solution"], atol=1e-5)
            np.testing.assert_allclose(solution.value, problem.root, rtol=1e-9)
            assert counters(solution)["num_steps"] <= 8


def test_descent_goes_on_where_the_rest_of_the_direction_is_none():
    """Boggs's problem on [−1, 1] × [0, 1]: solved from everywhere, where plain projection is not;
    the products are counted."""
    lower, upper = jnp.array([-1.0, 0.0]), jnp.array([1.0, 1.0])
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 6), np.linspace(0, 1, 6)), -1).reshape(-1, 2)
    failed = []
    for bending in (Projected(), ProjectedDescent()):
        solutions = solver_of("boggs", bending)(jnp.asarray(grid), lower, upper)
        made = [lane(solutions, k) for k in range(len(grid))]
        failed.append(sum(not reason(s).startswith("residual") for s in made))
        for solution in made:
            assert np.all(np.isfinite(rows(solution)["norm"]))
            counted = counters(solution)
            wanted = counted["num_steps"] if isinstance(bending, ProjectedDescent) else 0
            if reason(solution).startswith("residual"):
                assert counted["num_transposed_matvecs"] == wanted
    assert failed[0] > 3 and failed[1] == 0


def test_the_direction_of_descent_against_numpy():
    """Newton's where it descends, the projected gradient's Cauchy step elsewhere: both occur."""
    rng = np.random.default_rng(6)
    lower, upper = np.zeros(5), np.ones(5)
    bounds = Box(jnp.asarray(lower), jnp.asarray(upper))

    @jax.jit
    def fitted(operator, minus_f, d, y):
        norm = jnp.linalg.norm(minus_f)
        slope = -jnp.vdot(minus_f, operator.mv(d)) / norm**2
        found = Direction(d, slope, 0 * norm, 0 * norm)
        model = nks.Model(operator, minus_f, norm, found, None, jnp.array(0), jnp.array(True))
        return ProjectedDescent(0.3).direction(bounds, y, model)[0]

    kinds = {"newton": 0, "held": 0, "gradient": 0}
    for k in range(80):
        jacobian, f = rng.standard_normal((5, 5)), rng.standard_normal(5)
        y = rng.uniform(0, 1, 5) if k % 4 == 0 else rng.choice([0.0, 0.5, 1.0], 5)
        d = -np.linalg.solve(jacobian, f)
        operator = lx.MatrixLinearOperator(jnp.asarray(jacobian))
        got = fitted(operator, -jnp.asarray(f), jnp.asarray(d), jnp.asarray(y))
        free = lambda v, y=y: np.where(((y == 0) & (v < 0)) | ((y == 1) & (v > 0)), 0.0, v)
        gradient, square = jacobian.T @ f, f @ f
        slope = gradient @ free(d) / square
        if slope <= -0.3 or np.all(free(d) == d):
            kinds["newton" if np.all(free(d) == d) else "held"] += 1
            wanted = d
        else:
            kinds["gradient"] += 1
            down = free(-gradient)
            image = jacobian @ down
            wanted = down @ down / (image @ image) * down
            slope = gradient @ wanted / square
            promised = np.linalg.norm(f + jacobian @ wanted) / np.sqrt(square)
            np.testing.assert_allclose(got.residual, promised, rtol=1e-10)
            assert slope < 0
        np.testing.assert_allclose(got.vector, wanted, rtol=1e-10)
        np.testing.assert_allclose(got.slope, slope, rtol=1e-9)
    assert min(kinds.values()) >= 5


# --- what a solve does at a bound --------------------------------------------------------------


def test_one_step_of_each():
    """The first trial points of a linear problem with d = (−4, 2, 1), y = (1, 0, 0), y₁ ≥ 0."""
    target = jnp.array([-3.0, 2.0, 1.0])
    fn = lambda y, a: y - a
    y0 = jnp.array([1.0, 0.0, 0.0])
    for bending, point in (
        (Projected(), [0.0, 2.0, 1.0]),
        (Interior(0.8), [0.2, 2.0, 1.0]),
        (Shortened(0.8), [0.2, 0.4, 0.2]),
    ):
        search = Feasible(lower=jnp.array([0.0, -jnp.inf, -jnp.inf]), bending=bending)
        solver = nks.NewtonKrylov(
            0.0, 1e-9, globalisation=search, forcing=nks.ConstantForcing(1e-12), history_length=9
        )
        recorded = nks.Recorded(solver, trials=(1,))
        solution = run(fn, recorded, y0, target, max_steps=1)
        np.testing.assert_allclose(solution.stats["iterates"][0], point, atol=1e-12)
        norm = np.linalg.norm(np.asarray(point) - target)
        np.testing.assert_allclose(rows(solution)["norm"][1], norm, rtol=1e-12)
        length = rows(solution)["step_length"][1]
        assert length == pytest.approx(0.2 if isinstance(bending, Shortened) else 1.0)


@each_bending
def test_a_root_that_lies_outside_is_no_success(bending):
    """y + 1 = 0 and y ≥ ½: held at the bound, and said so; the other unknown is solved."""
    fn = walled(lambda y, a: y + a)
    args = jnp.array([1.0, -2.0]), jnp.full(2, 0.5), jnp.full(2, 5.0)
    search = Feasible(lower=0.5, upper=5.0, bending=bending)
    solver = nks.NewtonKrylov(0.0, 1e-8, globalisation=search, history_length=512)
    solution = run(fn, solver, jnp.array([3.0, 1.0]), args, max_steps=500)
    assert reason(solution) in ("step_small", "line_search_failed", "stagnated")
    assert solution.result != optx.RESULTS.successful
    np.testing.assert_allclose(solution.value[0], 0.5, rtol=1e-9)
    if not isinstance(bending, Shortened):  # with which the one holds up the other
        np.testing.assert_allclose(solution.value[1], 2.0, rtol=1e-7)
    assert_honest(solution, fn, jnp.array([3.0, 1.0]), args, rtol=0.0, atol=1e-8)
    assert np.all(np.isfinite(rows(solution)["norm"]))


def test_a_bound_that_is_a_singularity():
    """log y, from where Newton's step is beyond 0: projected onto the singularity and back, or
    shortened in front of it, which never sees a value that is not finite."""
    fn = lambda y, a: jnp.log(y) - a
    solver = lambda bending: nks.NewtonKrylov(
        0.0,
        1e-10,
        globalisation=Feasible(lower=0.0, bending=bending),
        history_length=64,
    )
    finite = {}
    for bending in (Projected(), Interior(), Shortened()):
        solution = run(fn, solver(bending), jnp.full(2, 40.0), jnp.array([0.5, -1.0]), max_steps=60)
        assert reason(solution) == "residual_atol"
        np.testing.assert_allclose(solution.value, np.exp([0.5, -1.0]), rtol=1e-9)
        finite[type(bending)] = bool(np.all(np.isfinite(rows(solution)["norm"])))
    assert finite == {Projected: False, Interior: True, Shortened: True}


# --- the initial point -------------------------------------------------------------------------


def test_the_initial_point():
    """Outside: refused where it is known, projected where it is traced."""
    fn = walled(lambda y, a: y**3 - a)
    lower, upper, y0 = jnp.array([0.5, 0.5]), jnp.array([9.0, 3.0]), jnp.array([0.1, 7.0])
    args = jnp.array([1.0, 8.0]), lower, upper
    search = Feasible(lower=lower, upper=upper)
    solver = nks.NewtonKrylov(0.0, 1e-10, globalisation=search, history_length=32)
    f_struct = jax.eval_shape(lambda: y0)
    with pytest.raises(ValueError, match=r"initial point.*\[0.5 3"):
        solver.init(lambda y, a: (fn(y, a), None), y0, args, {}, f_struct, None, frozenset())
    solution = run(fn, solver, y0, args)
    assert reason(solution) == "residual_atol"
    record = rows(solution)
    assert np.all(np.isfinite(record["norm"]))
    np.testing.assert_allclose(record["norm"][0], np.linalg.norm(fn(jnp.array([0.5, 3.0]), args)))
    np.testing.assert_allclose(solution.value, [1.0, 2.0])


# --- with everything else ----------------------------------------------------------------------

SEARCHES = [
    nks.FullStep(),
    nks.Damped(0.7),
    nks.Backtracking(),
    nks.Parabolic(),
    nks.NonMonotone(),
    nks.CriticalPoint(),
    nks.Dogleg(),
    nks.Hookstep(),
    nks.PseudoTransient(1.0),
]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
def test_every_globalisation_stays_inside(search):
    """Steps that overshoot lower and upper bounds, and come back; lanes as if alone."""

    def curved(y, a):
        e = y - a
        concave = jnp.log((y[:2] + 1.1) / (a[:2] + 1.1))
        return jnp.append(concave, jnp.expm1(e[2])) + 0.02 * e[::-1]

    fn = walled(curved)
    lower, upper = jnp.array([0.0, -1.0, -2.0]), jnp.array([1.0, jnp.inf, 2.0])
    bending = Shortened() if isinstance(search, nks.Parabolic) else Projected()
    wrapped = Feasible(search, lower, upper, bending)
    solver = nks.NewtonKrylov(0.0, 1e-8, globalisation=wrapped, history_length=101)
    y0 = jnp.array([1.0, 1.5, -2.0])
    roots = jnp.array([[0.1, -0.9, 1.5], [0.1, -0.7, -1.9], [0.9, 2.0, 1.8]])
    solve = lambda a: run(fn, solver, y0, (a, lower, upper), max_steps=100)
    batch = jax.jit(jax.vmap(solve))(roots)
    for k, root in enumerate(roots):
        solution = lane(batch, k)
        assert np.all(np.isfinite(rows(solution)["norm"]))
        assert reason(solution) == "residual_atol"
        np.testing.assert_allclose(solution.value, root, atol=1e-7)
    if not isinstance(search, nks.Backtracking | nks.Dogleg):  # a program more for each
        return
    alone = solve(roots[1])
    assert counters(alone) == counters(lane(batch, 1))
    np.testing.assert_allclose(alone.value, batch.value[1], rtol=1e-12)


class Pair(eqx.Module):
    rate: jax.Array
    amount: dict
    activation: object = jnp.tanh


@each_bending
def test_trees_and_precision(bending):
    """A module with a leaf that is no array, in float32, bounds as a prefix."""

    def fn(y, a):
        outside = (y.rate < 0).any() | (y.amount["x"] > 2).any()
        rate = y.activation(y.rate) - 0.3 * a
        x = y.amount["x"] ** 2 + 0.1 * y.rate[0] - a
        out = Pair(rate, {"x": x}, None)
        return jax.tree.map(lambda f: jnp.where(outside, jnp.nan, f), out)

    y0 = Pair(jnp.full(3, 1.8, jnp.float32), {"x": jnp.ones((2, 1), jnp.float32)})
    lower = Pair(0.0, None, None)  # pyright: ignore[reportArgumentType]
    upper = Pair(None, 2.0, None)  # pyright: ignore[reportArgumentType]
    search = Feasible(lower=lower, upper=upper, bending=bending)
    solver = nks.NewtonKrylov(0.0, 1e-5, globalisation=search, history_length=64)
    solution = run(fn, solver, y0, jnp.float32(1.0), max_steps=60)
    assert reason(solution) == "residual_atol"
    assert solution.value.rate.dtype == solution.value.amount["x"].dtype == jnp.float32
    np.testing.assert_allclose(solution.value.rate, np.arctanh(0.3), rtol=1e-4)
    amount = np.sqrt(1 - 0.1 * np.arctanh(0.3))
    np.testing.assert_allclose(solution.value.amount["x"], amount, rtol=1e-4)
    assert np.all(np.isfinite(rows(solution)["norm"]))


def test_derivatives_are_those_of_the_root():
    """The bounds have none, traced or not; the root has that of the implicit function theorem."""

    def solve(a, lower):
        search = Feasible(lower=lower, upper=9.0)
        solver = nks.NewtonKrylov(1e-12, 1e-12, globalisation=search)
        fn = lambda y, a: y**2 - a
        return nks.root_find(fn, solver, jnp.array([4.0, 0.6]), a).value

    a, lower = jnp.array([2.0, 3.0]), jnp.array([0.5, 0.5])
    modes = jax.jit(lambda *p: [m(solve, argnums=(0, 1))(*p) for m in (jax.jacfwd, jax.jacrev)])
    for by_a, by_lower in modes(a, lower):
        np.testing.assert_allclose(by_a, np.diag(0.5 / np.sqrt(a)), rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(by_lower, np.zeros((2, 2)))

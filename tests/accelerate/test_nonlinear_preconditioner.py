"""Nonlinear preconditioning: against loops written down in NumPy, and where it mends a solve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve.accelerate.nonlinear_preconditioner import NonlinearPreconditioner
from nksolve.accelerate.nonlinearly_preconditioned import LeftPreconditioned, RightPreconditioned
from nksolve.precondition.multigrid import Multigrid
from nksolve.problems.bratu import bratu_1d
from nksolve.problems.chandrasekhar import chandrasekhar
from nksolve.problems.stencils import neighbour_sum
from tests.helpers import Counter
from tests.newton.solving import assert_honest, counters, reason, rows, run

COUNTER = Counter()
ONCE = nks.Picard(0.0, 0.0)


def balanced(x, shift):
    """Two equations of very unlike nonlinearity, after Cai & Keyes; a root at (1, 1) for 1."""
    x1, x2 = COUNTER.tick(x)
    return jnp.stack([(x1 - x2**3 + shift) ** 3 - x2**3, x1 + 2 * x2 - 2 - shift])


def eliminated(x, shift):
    """The first equation solved for x₁."""
    return jnp.stack([x[1] ** 3 - shift + x[1] - x[0], 0 * x[1]])


def both(x, shift):
    """Each equation solved for its own unknown, all at once: the sum of local solves."""
    return jnp.stack([x[1] ** 3 - shift + x[1], (2 + shift - x[0]) / 2]) - x


ELIMINATION = NonlinearPreconditioner(ONCE, fn=eliminated)
JACOBI = NonlinearPreconditioner(ONCE, fn=both)
START, ONE = jnp.array([-0.5, 2.0]), jnp.array(1.0)


def newton(rtol=1e-10, atol=1e-12, **keywords):
    tight = {"linear_solver": nks.GMRES(restart=62), "forcing": nks.ConstantForcing(1e-11)}
    return nks.NewtonKrylov(rtol, atol, history_length=64, **(tight | keywords))


def plain_loop(fn, y, steps):
    """Newton's method with full steps."""
    points = [y]
    for _ in range(steps):
        points.append(points[-1] - np.linalg.solve(jax.jacfwd(fn)(points[-1]), fn(points[-1])))
    return points


def test_right_is_the_loop_written_down():
    solver = RightPreconditioned(newton(globalisation=nks.FullStep()), ELIMINATION)
    with COUNTER.measure() as count:
        solution = run(balanced, solver, START, ONE)
        evals = int(solution.stats["num_fn_evals"])
    assert count.primal == evals
    steps, y, norms = int(solution.stats["num_steps"]), START, []
    fn = lambda x: balanced(x, ONE)
    for k in range(steps + 1):
        moved = y + eliminated(y, ONE)
        y = moved if np.linalg.norm(fn(moved)) <= np.linalg.norm(fn(y)) else y
        norms.append(np.linalg.norm(fn(y)))
        y = y if k == steps else plain_loop(fn, y, 1)[1]
    np.testing.assert_allclose(rows(solution)["norm"], norms, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(solution.value, y, rtol=1e-12)
    np.testing.assert_allclose(solution.value, 1, rtol=1e-9)
    assert evals == 2 * (steps + 1) == int(solution.stats["num_linearisations"])
    assert int(solution.stats["num_inner_fn_evals"]) == steps + 1
    assert_honest(solution, balanced, START, ONE, rtol=1e-10, atol=1e-12)


def test_left_is_the_loop_written_down():
    solver = LeftPreconditioned(newton(globalisation=nks.FullStep()), JACOBI)
    with COUNTER.measure() as count:
        solution = run(balanced, solver, START, ONE)
        evals = int(solution.stats["num_fn_evals"])
    steps = int(solution.stats["num_steps"])
    assert count.primal == evals == steps + 1
    points = plain_loop(lambda x: both(x, ONE), START, steps)
    norms = [np.linalg.norm(balanced(x, ONE)) for x in points]
    np.testing.assert_allclose(rows(solution)["norm"], norms, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(solution.value, points[-1], rtol=1e-10)
    assert_honest(solution, balanced, START, ONE, rtol=1e-10, atol=1e-12)


def powell(x, c):
    """After Powell's example of 1970: with c = 0 his own, and roots at (0, ±√(c/2))."""
    return jnp.stack([x[0], 10 * x[0] / (x[0] + 0.1) + 2 * x[1] ** 2 - c])


def test_elimination_mends_a_line_search_that_fails():
    """Of the first equation, which is linear; Newton's method leaves it by λ at a time."""
    start, c = jnp.array([3.0, 0.5]), jnp.array(2.0)
    plain = run(powell, newton(0.0, 1e-10), start, c)
    assert reason(plain) == "line_search_failed"
    assert float(plain.value[0]) > 2 and abs(float(plain.value[1])) < 1e-5  # not even a minimum
    first = NonlinearPreconditioner(ONCE, fn=lambda x, _: jnp.stack([-x[0], 0 * x[1]]))
    right = run(powell, RightPreconditioned(newton(0.0, 1e-10), first), start, c)
    assert reason(right) == "residual_atol"
    assert counters(right)["num_steps"] <= 6 and counters(right)["num_rejected_steps"] == 0
    np.testing.assert_allclose(right.value, [0, 1], atol=1e-9)
    assert_honest(right, powell, start, c, rtol=0.0, atol=1e-10)


def coupled(y, args):
    """−u″ + v + 2u = 3 with the first equation of `balanced` for v at every node; and aux."""
    u, v = y["u"], y["v"]
    h = 1 / (u.shape[0] + 1)
    diffusion = 2 * u - neighbour_sum(u) + h**2 * args * (v + 2 * u - 3)
    return {"u": diffusion, "v": (v - u**3 + 1) ** 3 - u**3}, jnp.sum(u)


def local(y, args):
    return {"u": 0 * y["u"], "v": y["u"] ** 3 - 1 + y["u"] - y["v"]}


def test_elimination_in_a_boundary_value_problem():
    n = 31
    u = 2 * jnp.sin(jnp.pi * jnp.linspace(0, 1, n + 2)[1:-1])
    start, args = {"u": u, "v": jnp.full(n, -2.0)}, jnp.array(1.0)
    plain = run(coupled, newton(1e-10, 1e-10), start, args, has_aux=True)
    solver = RightPreconditioned(newton(1e-10, 1e-10), NonlinearPreconditioner(ONCE, fn=local))
    right = run(coupled, solver, start, args, has_aux=True)
    assert reason(right) in ("residual_atol", "residual_rtol")
    np.testing.assert_allclose(right.aux, jnp.sum(right.value["u"]), rtol=1e-14)
    np.testing.assert_allclose(right.value["u"], plain.value["u"], atol=1e-5)
    few, many = counters(right), counters(plain)
    assert few["num_steps"] <= 4 and many["num_steps"] >= 20
    assert few["num_rejected_steps"] == 0 and many["num_rejected_steps"] >= 9
    assert 4 * few["num_fn_evals"] <= many["num_fn_evals"]
    assert 7 * few["num_matvecs"] <= many["num_matvecs"]


def test_a_poor_preconditioner_costs_evaluations_and_no_more():
    fn = lambda x, args: balanced(x, args[0])
    poor = NonlinearPreconditioner(ONCE, fn=lambda x, args: args[1] + 0 * x)
    for away in (jnp.nan, 1e3):
        args = ONE, jnp.array(away)
        right = run(fn, RightPreconditioned(newton(), poor), START, args)
        plain = run(fn, newton(), START, args)
        np.testing.assert_allclose(rows(right)["norm"], rows(plain)["norm"], rtol=1e-13)
        np.testing.assert_array_equal(right.value, plain.value)
        same = ("num_steps", "num_rejected_steps", "num_matvecs")
        assert all(counters(right)[k] == counters(plain)[k] for k in same)
        assert counters(right)["num_fn_evals"] == 2 * counters(plain)["num_fn_evals"]


def test_no_success_where_the_preconditioner_alone_is_content():
    """N(x) = x everywhere, so that N(x) − x = 0 is solved; F is not."""
    idle = NonlinearPreconditioner(ONCE, fn=lambda x, _: 0 * x)
    solution = run(balanced, LeftPreconditioned(newton(), idle), START, ONE)
    assert reason(solution) == "linear_solve_failed"
    assert solution.result != optx.RESULTS.successful
    np.testing.assert_array_equal(solution.value, START)
    assert_honest(solution, balanced, START, ONE, rtol=1e-10, atol=1e-12)


def test_a_start_that_the_preconditioner_solves():
    """The tolerance is that of F(y₀), and the point is returned that it holds at."""
    fn = lambda x, b: x - b
    inner = NonlinearPreconditioner(ONCE, fn=lambda x, b: b * (1 + 1e-9) - x)
    start, args = jnp.zeros(3), jnp.arange(1.0, 4.0)
    solution = run(fn, RightPreconditioned(newton(1e-6, 0.0), inner), start, args)
    assert reason(solution) == "residual_rtol" and int(solution.stats["num_steps"]) == 0
    np.testing.assert_array_equal(solution.value, args * (1 + 1e-9))
    np.testing.assert_allclose(solution.stats["initial_residual_norm"], np.sqrt(14))
    nan = lambda x, b: jnp.where(jnp.all(x == 0), jnp.nan, x - b)
    mended = run(nan, RightPreconditioned(newton(0.0, 1e-6), inner), start, args)
    assert reason(mended) == "residual_atol"
    never = run(lambda x, b: x * jnp.nan, RightPreconditioned(newton(), inner), start, args)
    assert reason(never) == "nonfinite" and bool(jnp.all(never.value == 0))


@functools.cache
def solver_of(side):
    return {
        "right": RightPreconditioned(newton(), ELIMINATION),
        "left": LeftPreconditioned(newton(), JACOBI),
    }[side]


def answer(side, y, shift):
    solution = nks.root_find(balanced, solver_of(side), y, shift, throw=False)
    return solution.value, solution.stats


@pytest.mark.parametrize("side", ["right", "left"])
def test_lanes_and_gradients(side):
    starts = jnp.array([[-0.5, 2.0], [1.0, 1.0], [3.0, -2.5]])
    alone = [answer(side, y, ONE) for y in starts]
    values, stats = jax.jit(jax.vmap(lambda y: answer(side, y, ONE)))(starts)
    np.testing.assert_allclose(values, jnp.stack([v for v, _ in alone]), rtol=1e-9)
    steps = [int(s["num_steps"]) for _, s in alone]
    assert len(set(steps)) == 3 and steps[1] == 0
    for name in ("num_steps", "num_rejected_steps", "num_fn_evals", "num_inner_fn_evals"):
        np.testing.assert_array_equal(stats[name], jnp.stack([s[name] for _, s in alone]))

    def root(shift):
        return answer(side, START, shift)[0]

    with COUNTER.measure() as count:
        value, pullback = jax.vjp(root, ONE)
        (reverse,) = pullback(jnp.array([1.0, 0.5]))
    assert count.primal == int(alone[0][1]["num_fn_evals"])  # a gradient evaluates no more
    jacobian, by_shift = jax.jacfwd(balanced, argnums=(0, 1))(value, ONE)
    expected = -np.linalg.solve(jacobian, by_shift)
    np.testing.assert_allclose(reverse, expected @ np.array([1.0, 0.5]), rtol=1e-7)


INNERS = {
    "anderson": (nks.Anderson(0.0, 0.0, depth=3), 4),
    "newton": (nks.NewtonKrylov(0.0, 0.0, forcing=nks.ConstantForcing(1e-10)), 1),
    "picard": (ONCE, 3),
    "ngmres": (nks.NGMRES(0.0, 0.0, depth=3), 2),
    "broyden": (nks.Broyden(0.0, 0.0), 3),
}
QUICK = ("anderson", "newton")
KINDS = [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in INNERS]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "side", [RightPreconditioned, pytest.param(LeftPreconditioned, marks=pytest.mark.slow)]
)
def test_inner_solvers(side, name):
    problem = chandrasekhar(16, 0.99)
    fn = lambda x, args: -problem.fn(COUNTER.tick(x), args)
    inner, steps = INNERS[name]
    policy = nks.Recompute() if (side, name) == (LeftPreconditioned, "newton") else nks.Linearise()
    solver = side(
        nks.NewtonKrylov(1e-10, 0.0, policy=policy), NonlinearPreconditioner(inner, steps=steps)
    )
    with COUNTER.measure() as count:
        solution = run(fn, solver, problem.y0, problem.args)
        evals = int(solution.stats["num_fn_evals"])
    # What a nested derivative evaluates once more at a trial is not counted.
    uncounted = int(solution.stats["num_steps"]) + 1 if isinstance(policy, nks.Recompute) else 0
    assert evals <= count.primal <= evals + uncounted
    assert reason(solution) == "residual_rtol"
    assert int(solution.stats["num_steps"]) <= (7 if name == "picard" else 5)
    np.testing.assert_allclose(problem.fn(solution.value, problem.args), 0, atol=1e-9)


def test_a_multigrid_cycle_as_preconditioner():
    problem = bratu_1d(31, 3.0)
    grids = Multigrid(problem.fn, nks.VertexDirichlet())
    cycle = nks.FAS(0.0, 0.0, grids)
    solver = RightPreconditioned(
        newton(1e-10, 0.0, linear_solver=nks.GMRES(preconditioner=grids)),
        NonlinearPreconditioner(cycle),
    )
    solution = run(problem.fn, solver, problem.y0, problem.args)
    assert reason(solution) == "residual_rtol" and int(solution.stats["num_steps"]) <= 3
    assert problem.continuum is not None
    np.testing.assert_allclose(solution.value, problem.continuum, atol=2e-3)


def test_float32_and_complex():
    single = run(
        balanced,
        RightPreconditioned(newton(1e-5, 1e-6), ELIMINATION),
        START.astype(jnp.float32),
        ONE.astype(jnp.float32),
    )
    assert single.value.dtype == jnp.float32
    np.testing.assert_allclose(single.value, 1, rtol=1e-4)
    fn = lambda z, c: z**3 - c
    sweep = NonlinearPreconditioner(nks.Picard(0.0, 0.0, damping=0.1), steps=2)
    for side in (RightPreconditioned, LeftPreconditioned):
        start, cube = jnp.array([1.0 + 1.0j, -1.0 + 0.5j]), jnp.array([1.0j, 2.0 + 0.0j])
        solution = run(fn, side(newton(), sweep), start, cube)
        np.testing.assert_allclose(solution.value**3, cube, rtol=1e-9)


def test_what_does_not_go_together_is_refused():
    # Where annotations are checked, the checker is the first to say so.
    with pytest.raises(TypeError, match="NewtonKrylov"):
        RightPreconditioned(ONCE, ELIMINATION)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="NonlinearPreconditioner"):
        LeftPreconditioned(newton(), ONCE)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="A sweep of your own"):
        NonlinearPreconditioner(nks.Recorded(ONCE, (0,)))  # pyright: ignore
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        NonlinearPreconditioner(ONCE, steps=0)
    inner = NonlinearPreconditioner(nks.NewtonKrylov(0.0, 0.0))
    with pytest.raises(nks.LinearisationError, match=r"policy=nks.Recompute\(\)"):
        run(balanced, LeftPreconditioned(newton(), inner), START, ONE)
    with pytest.raises(ValueError, match="takes no options"):
        run(balanced, RightPreconditioned(newton(), ELIMINATION), START, ONE, options={"a": 1})

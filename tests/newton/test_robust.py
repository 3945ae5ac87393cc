"""`Robust` hands over, keeps what it saw, and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve.newton.robust import Along, Attempt, FromBest, FromInitial, Robust
from nksolve.problems import get

from .solving import assert_honest, counters, max_norm, reason, rows, run, trials

EXACT = nks.ConstantForcing(1e-10)


def names(solution):
    """Why each attempt ended, those that were made."""
    codes = np.asarray(solution.stats["attempt_reasons"])
    return [nks.reason_name(int(c)) for c in codes[: int(solution.stats["num_attempts"])]]


def test_one_attempt_is_newton():
    problem = get("wood")
    made = [
        run(problem.fn, solver, problem.y0, problem.args, max_steps=100)
        for solver in (
            nks.NewtonKrylov(0.0, 1e-8, forcing=EXACT, history_length=101),
            Robust(
                0.0,
                1e-8,
                attempts=(Attempt(nks.Backtracking(), EXACT, FromInitial()),),
                history_length=101,
            ),
        )
    ]
    for name, column in rows(made[0]).items():
        np.testing.assert_array_equal(column, rows(made[1])[name], err_msg=name)
    assert counters(made[0]) == {k: v for k, v in counters(made[1]).items() if "attempt" not in k}
    assert names(made[1]) == ["residual_atol"]


def test_a_local_minimum_is_left_behind():
    """Freudenstein–Roth: the line search ends in its local minimum, the full steps do not."""
    problem = get("freudenstein-roth")
    attempts = (
        Attempt(nks.Backtracking(), EXACT, FromInitial()),
        Attempt(nks.FullStep(), EXACT, FromInitial()),
    )
    solver = Robust(0.0, 1e-8, attempts=attempts, history_length=200)
    solution = run(problem.fn, solver, problem.y0, problem.args, max_steps=150)
    assert names(solution)[0] in ("line_search_failed", "step_small", "max_steps")
    assert names(solution)[-1] == reason(solution) == "residual_atol"
    assert_honest(solution, problem.fn, problem.y0, problem.args, rtol=0.0, atol=1e-8)
    # The hand-over is one more evaluation: the first point again.
    record = rows(solution)
    codes = [nks.reason_name(int(c)) for c in record["reason"]]
    again = next(k for k, name in enumerate(codes) if name != "iterating") + 1
    assert record["norm"][again] == record["norm"][0]
    assert trials(solution) == counters(solution)["num_linearisations"]


def test_where_attempts_begin():
    """From the first point, from the best, and along the direction that failed."""
    seen = []

    def fn(y, _):
        jax.debug.callback(lambda y: seen.append(float(y[0])), y)
        return jnp.where(y > 5.0, jnp.nan, y**2 + 1.0)  # no root; least at 0

    attempts = (
        Attempt(nks.Backtracking(), EXACT, FromInitial(), 1),
        Attempt(nks.FullStep(), EXACT, FromBest(), 1),
        Attempt(nks.FullStep(), EXACT, FromInitial(), 1),
        Attempt(nks.FullStep(), EXACT, Along(0.5), 1),
    )
    solver = Robust(0.0, 1e-8, attempts=attempts, linear_solver=nks.DenseDirect())
    solution = run(fn, solver, jnp.array([2.0]), max_steps=7)
    jax.effects_barrier()
    newton = lambda y: y - (y**2 + 1) / (2 * y)
    first = newton(2.0)
    # Each attempt has its start and one trial; the best point is 0.75 at first, then 0.2917.
    second = newton(first)
    third = newton(2.0)
    step = newton(third) - third
    wanted = [2.0, first, first, second, 2.0, third, third + 0.5 * step]
    np.testing.assert_allclose(seen[: len(wanted)], wanted, rtol=1e-12)
    assert reason(solution) == "max_steps"
    best = min(seen, key=lambda y: y**2)
    np.testing.assert_allclose(solution.value, [best])


def test_lanes_hand_over_on_their_own():
    """A lane that succeeds at once, one that hands over, one without a root: as if alone."""

    def fn(y, a):
        roth = jnp.stack(
            [
                y[0] + ((5 - y[1]) * y[1] - 2) * y[1] - 13,
                y[0] + ((y[1] + 1) * y[1] - 14) * y[1] - 29,
            ]
        )
        return jnp.where(a == 0, y - 1.0, jnp.where(a == 1, roth, y**2 + 1.0))

    attempts = (
        Attempt(nks.Backtracking(), EXACT, FromInitial(), 30),
        Attempt(nks.FullStep(), EXACT, FromInitial(), 60),
        Attempt(nks.Dogleg(), EXACT, FromBest(), 10),
    )
    solver = Robust(0.0, 1e-6, attempts=attempts)
    y0, kinds = jnp.array([0.5, -2.0]), jnp.arange(3.0)

    def solve(a):
        solution = run(fn, solver, y0, a, max_steps=120)
        stats = solution.stats
        return (
            solution.value,
            stats["attempt_reasons"],
            stats["num_fn_evals"],
            stats["num_attempts"],
        )

    batch = jax.jit(jax.vmap(solve))(kinds)
    alone = jax.jit(solve)
    for k, kind in enumerate(kinds):
        for got, wanted in zip(batch, alone(kind), strict=True):
            np.testing.assert_allclose(got[k], wanted, rtol=1e-9, atol=1e-15)
    assert list(batch[3]) == [1, 2, 3]


def test_it_is_an_optimistix_solver_and_has_a_gradient():
    problem = get("freudenstein-roth")
    solver = Robust(0.0, 1e-10)
    found = optx.root_find(
        lambda y, a: problem.fn(y, a), solver, problem.y0, problem.args, max_steps=257
    )
    np.testing.assert_allclose(found.value, [5.0, 4.0], rtol=1e-8)

    def fn(y, a):
        return problem.fn(y, problem.args) - a

    def root(a):
        return nks.root_find(fn, solver, problem.y0, a, max_steps=256).value.sum()

    slope = jax.grad(root)(jnp.zeros(2))
    jacobian = jax.jacfwd(lambda y: fn(y, jnp.zeros(2)))(jnp.array([5.0, 4.0]))
    np.testing.assert_allclose(
        slope, np.linalg.solve(np.asarray(jacobian).T, np.ones(2)), rtol=1e-6
    )


def test_nan_at_the_start_and_no_root():
    """The reason of the last attempt; y₀ where nothing was finite; the best point otherwise."""
    bad = run(lambda y, _: y * jnp.nan, Robust(0.0, 1e-8), jnp.ones(2), max_steps=50)
    assert reason(bad) == "nonfinite"
    np.testing.assert_array_equal(bad.value, [1.0, 1.0])
    none = run(lambda y, _: y**2 + 1.0, Robust(0.0, 1e-8), jnp.full(2, 3.0), max_steps=200)
    assert none.result != optx.RESULTS.successful
    assert float(max_norm(none.value)) < 1.0


def test_bad_arguments():
    with pytest.raises(TypeError, match="Attempt"):
        Robust(0.0, 1e-8, attempts=(nks.Backtracking(),))
    with pytest.raises(ValueError, match="max_trials"):
        Attempt(nks.Backtracking(), max_trials=0)

"""NGMRES: GMRES on linear problems, two evaluations a step, selection and restarts."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve.accelerate.ngmres import NGMRES
from nksolve.accelerate.qr_window import AngleFilter
from nksolve.problems.chandrasekhar import chandrasekhar
from tests.accelerate.test_anderson import cell, parameters
from tests.helpers import Counter

COUNTER = Counter()


def reason(solution):
    return nks.reason_name(solution.stats["reason"])


def test_h_equation_at_two_evaluations_a_step():
    problem = chandrasekhar(128, 0.99)
    fn = lambda x, args: -problem.fn(COUNTER.tick(x), args)
    solver = NGMRES(1e-10, 0.0, depth=6)
    with COUNTER.measure() as count:
        solution = nks.root_find(fn, solver, problem.y0, problem.args)
        steps = int(solution.stats["num_steps"])
    assert steps <= 14
    assert count.primal == int(solution.stats["num_fn_evals"]) == 2 * steps + 1
    np.testing.assert_allclose(jnp.mean(solution.value), problem.published["mean"], rtol=1e-8)


def test_gmres_on_a_linear_problem():
    """x^A is the iterate of GMRES, if every mixed point is taken (Washio & Oosterlee 1997)."""
    n, steps = 24, 8
    rng = np.random.default_rng(5)
    jacobian = 0.7 * rng.standard_normal((n, n)) / np.sqrt(n) - np.eye(n)
    rhs = rng.standard_normal(n)
    solver = NGMRES(0.0, 0.0, depth=12, damping=0.8, history_length=steps + 1)
    fn = lambda x, b: jnp.asarray(jacobian) @ x + b
    start, args = jnp.zeros(n), jnp.asarray(rhs)
    solution = nks.root_find(fn, solver, start, args, max_steps=steps, throw=False)
    krylov, expected = [rhs], [np.linalg.norm(rhs)]
    for k in range(1, steps + 1):
        image = jacobian @ np.array(krylov).T
        expected.append(np.linalg.norm(rhs - image @ np.linalg.lstsq(image, rhs, rcond=None)[0]))
        krylov.append(jacobian @ krylov[-1] / np.linalg.norm(jacobian @ krylov[-1]))
        assert len(krylov) == k + 1
    np.testing.assert_allclose(solution.stats["history"].norm, expected, rtol=1e-8)
    assert int(solution.stats["num_restarts"]) == 0


def test_restarts_and_candidates():
    """With γ_A tiny every candidate is taken: the iteration is Picard's, and always restarts."""
    args = parameters(12, 0.7)
    picky = NGMRES(1e-8, 0.0, depth=3, gamma_a=1e-30, gamma_c=1e-30, restart_after=1)
    solution = nks.fixed_point(cell, picky, jnp.zeros(12), args)
    assert int(solution.stats["num_restarts"]) == int(solution.stats["num_steps"]) - 1
    np.testing.assert_allclose(cell(solution.value, args), solution.value, atol=1e-9)
    free = nks.fixed_point(cell, NGMRES(1e-8, 0.0), jnp.zeros(12), args)
    assert int(free.stats["num_restarts"]) == 0
    assert int(free.stats["num_steps"]) < int(solution.stats["num_steps"])


def test_trials_and_candidates_that_are_not_finite():
    fn = lambda x, _: jnp.where(x > 3.0, jnp.nan, 2 - x)
    nan = nks.root_find(fn, NGMRES(1e-12, 0.0, damping=4.0), jnp.zeros(3))
    assert int(nan.stats["num_rejected_steps"]) > 0
    np.testing.assert_allclose(nan.value, 2, rtol=1e-12)
    first = nks.root_find(lambda x, _: x * jnp.nan, NGMRES(1e-8, 0.0), jnp.ones(2), throw=False)
    assert reason(first) == "nonfinite"
    still = nks.root_find(
        lambda x, _: 1 - x, NGMRES(1e-8, 0.0, damping=0.0), jnp.zeros(3), throw=False
    )
    assert reason(still) == "stagnated" and bool(jnp.all(still.value == 0))


def test_float32_and_pytrees():
    matrix, injection = parameters(16, 0.9, dtype=jnp.float32)
    fn = lambda y, b: {"a": cell(y["a"], (matrix, b)), "b": 0.5 * jnp.sin(y["b"]) + y["a"][:2]}
    y0 = {"a": jnp.zeros(16, jnp.float32), "b": jnp.zeros(2, jnp.float32)}
    solution = nks.fixed_point(fn, NGMRES(1e-6, 0.0, filter=AngleFilter()), y0, injection)
    assert reason(solution) == "residual_rtol"
    image = fn(solution.value, injection)
    for name, leaf in solution.value.items():
        np.testing.assert_allclose(image[name], leaf, atol=1e-6)


def test_lanes_stop_by_themselves():
    matrix, injection = parameters(16, 0.95, batch=3)
    injection = injection * jnp.array([[1e-6], [30.0], [200.0]])
    solver = NGMRES(1e-9, 0.0, depth=8)
    run = lambda b: (lambda s: (s.value, s.stats))(
        nks.fixed_point(cell, solver, jnp.zeros(16), (matrix, b), max_steps=200)
    )
    values, stats = jax.jit(jax.vmap(run))(injection)
    alone = jax.jit(run)
    assert len(set(stats["num_steps"].tolist())) > 1
    for i in range(3):
        value, lone = alone(injection[i])
        np.testing.assert_allclose(values[i], value, rtol=1e-7, atol=1e-14)
        for name in ("num_steps", "num_fn_evals", "num_restarts"):
            assert int(stats[name][i]) == int(lone[name]), name


def test_gradient_and_optimistix():
    args = parameters(12, 0.8)
    solver = NGMRES(1e-13, 0.0, linear_solver=nks.GMRES(1e-13, 0.0))
    solve = lambda args: nks.fixed_point(cell, solver, jnp.zeros(12), args).value
    weights = jnp.arange(12.0)
    value, grad = jax.jit(jax.value_and_grad(lambda args: weights @ solve(args)))(args)
    theirs = optx.fixed_point(cell, NGMRES(1e-13, 0.0), jnp.zeros(12), args).value
    np.testing.assert_allclose(weights @ theirs, value, rtol=1e-9)
    slope = 1 - np.asarray(theirs) ** 2
    jacobian = slope[:, None] * np.asarray(args[0]).T
    dense = slope * np.linalg.solve(np.eye(12) - jacobian.T, weights)
    np.testing.assert_allclose(grad[1], dense, rtol=1e-9)


def test_bad_arguments():
    for keywords in ({"depth": 0}, {"restart_after": 0}, {"gamma_a": 0.0}, {"delta_b": 1.5}):
        with pytest.raises(ValueError, match=next(iter(keywords))):
            NGMRES(1e-6, 0.0, **keywords)
    with pytest.raises(TypeError, match="filter"):
        NGMRES(1e-6, 0.0, filter=1e8)  # pyright: ignore

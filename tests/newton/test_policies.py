"""The five ways of linearising, inside Newton's method."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from tests.helpers.counting import Counter

from .solving import counters, reason, run, trials

POLICIES = (
    nks.Linearise(),
    nks.Checkpointed(),
    nks.Recompute(),
    nks.Transposed(),
    nks.FiniteDifference(),
)
Y0, ARGS = jnp.asarray([3.0, 2.9, 2.0]), jnp.asarray([1.0, 2.0, 3.0])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_same_root_and_honest_counters(policy):
    counter = Counter()

    def fn(y, args):
        y = counter.tick(y)
        return jnp.log(y) * args + 0.1 * jnp.flip(y) - 0.1

    with counter.measure() as count:
        solution = run(fn, nks.NewtonKrylov(1e-9, 0.0, policy=policy), Y0, ARGS)
    counted = counters(solution)
    assert reason(solution) == "residual_rtol"
    np.testing.assert_allclose(solution.value, jnp.ones(3), rtol=1e-8)
    assert counted["num_linearisations"] == trials(solution)
    assert counted["num_rejected_steps"] > 0
    evaluates_again = isinstance(policy, nks.Recompute | nks.FiniteDifference)
    if isinstance(policy, nks.Checkpointed):
        # What the backward pass of a checkpoint recomputes is an upper bound.
        assert count.primal <= counted["num_fn_evals"]
    else:
        assert count.primal == counted["num_fn_evals"]
        assert counted["num_fn_evals"] == (
            counted["num_linearisations"] + evaluates_again * counted["num_matvecs"]
        )


def _inner_loop(y, args):
    """√(y + 3) by Heron's method until it settles, minus args: y = args² − 3."""
    target = y + 3.0

    def unsettled(x):
        return jnp.max(jnp.abs(x * x - target)) > 1e-13 * jnp.max(target)

    return lax.while_loop(unsettled, lambda x: 0.5 * (x + target / x), target) - args


def test_finite_differences_solve_a_residual_with_a_loop():
    args = jnp.asarray([2.0, 3.0])
    y0 = jnp.ones(2)
    solver = nks.NewtonKrylov(1e-9, 0.0, policy=nks.FiniteDifference())
    solution = run(_inner_loop, solver, y0, args)
    assert reason(solution) == "residual_rtol"
    np.testing.assert_allclose(solution.value, args**2 - 3, rtol=1e-7)
    with pytest.raises(nks.LinearisationError, match="while_loop"):
        run(_inner_loop, nks.NewtonKrylov(1e-9, 0.0), y0, args)


@jax.custom_vjp
def _cube(y):
    return y**3


_cube.defvjp(lambda y: (y**3, y), lambda y, g: (3 * y**2 * g,))


def _reverse_only(y, args):
    return _cube(y) + 0.1 * jnp.flip(y) - args


def test_transposed_solves_a_custom_vjp():
    y0, args = jnp.asarray([3.0, 1.0]), jnp.asarray([8.1, 1.2])
    solver = nks.NewtonKrylov(1e-10, 0.0, policy=nks.Transposed())
    solution = run(_reverse_only, solver, y0, args)
    assert reason(solution) == "residual_rtol"
    np.testing.assert_allclose(solution.value, [2.0, 1.0], rtol=1e-8)
    with pytest.raises(nks.LinearisationError, match="custom_vjp"):
        run(_reverse_only, nks.NewtonKrylov(1e-10, 0.0), y0, args)


def test_bad_residual_is_refused_before_anything_runs():
    solver = nks.NewtonKrylov(1e-9, 0.0)
    with pytest.raises((TypeError, ValueError)):
        run(lambda y, args: y.astype(jnp.int32), solver, Y0)
    assert eqx.is_array(Y0)

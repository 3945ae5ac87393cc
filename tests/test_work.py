"""The work of a solve and of its derivatives, counted while it runs: §1 of the architecture.

`COUNTER` stands inside the residual and ticks once for each execution: `primal` for an evaluation
of fn, `tangent` and `transposed` for an application of its linearised map.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve import tree
from tests.helpers import Counter
from tests.helpers.counting import weighted

COUNTER = Counter()
N = 5
SOLVER = nks.NewtonKrylov(rtol=1e-10, atol=1e-10)
ARGS = {"scale": jnp.linspace(0.5, 1.5, N), "b": jnp.linspace(-0.3, 0.4, N)}
DIRECTION = {"scale": jnp.cos(jnp.arange(0.0, N)), "b": jnp.sin(jnp.arange(1.0, N + 1))}
FAR = jnp.linspace(6.0, 9.0, N)  # full Newton steps overshoot from here


def arctan(y, args):
    """Weakly coupled arctangents; both inputs tick, so that no evaluation escapes."""
    y, args = COUNTER.tick((y, args))
    return jnp.arctan(args["scale"] * (y - 0.2 * jnp.roll(y, 1))) - args["b"]


def solve(args, **kwargs):
    return nks.root_find(arctan, SOLVER, FAR, args, **kwargs)


def loss(args, **kwargs):
    y = solve(args, **kwargs).value
    return jnp.sum(jnp.sin(y) * y)


@ft.cache
def forward():
    """The solve and what was executed in it."""
    with COUNTER.measure() as count:
        solution = solve(ARGS)
    return solution, count


def evaluations(fn, *inputs):
    with COUNTER.measure() as count:
        fn(*inputs)
    return count


# --- forward --------------------------------------------------------------------------------


def test_trials_and_nothing_else_evaluate_the_residual():
    solution, count = forward()
    steps, rejected = (int(solution.stats[k]) for k in ("num_steps", "num_rejected_steps"))
    assert steps >= 3 and rejected >= 1  # the problem is one that rejects
    assert count.primal == 1 + steps + rejected
    assert count.tangent > steps  # Krylov iterations, which add no evaluation
    assert count.transposed == 0
    with COUNTER.measure() as count:
        eqx.filter_jit(solve)(ARGS)
    assert count.primal == 1 + steps + rejected


def test_counters_in_stats_are_what_was_counted():
    solution, count = forward()
    stats = {k: int(v) for k, v in solution.stats.items() if k.startswith("num_")}
    assert stats["num_fn_evals"] == stats["num_linearisations"] == count.primal
    assert stats["num_matvecs"] == count.tangent
    assert stats["num_transposed_matvecs"] == count.transposed == 0
    assert stats["num_preconditioner_applications"] == 0


def test_full_steps_cost_one_evaluation_each():
    """Newton for y² = a, entry by entry the same, against the scalar iteration in NumPy."""

    def square(y, a):
        y, a = COUNTER.tick((y, a))
        return y**2 - a

    y, steps = 3.0, 0
    while 2.0 * abs(y * y - 2.0) > 1e-9:  # ‖·‖₂ of four equal entries
        y, steps = y - (y * y - 2.0) / (2.0 * y), steps + 1
    solver = nks.NewtonKrylov(
        rtol=0.0, atol=1e-9, forcing=nks.ConstantForcing(1e-12), globalisation=nks.FullStep()
    )
    with COUNTER.measure() as count:
        solution = nks.root_find(square, solver, jnp.full(4, 3.0), jnp.full(4, 2.0))
    assert steps >= 4
    assert int(solution.stats["num_steps"]) == steps
    assert int(solution.stats["num_rejected_steps"]) == 0
    assert count.primal == steps + 1
    assert count.tangent == steps  # J is a multiple of the identity: one matvec a step


POLICIES = [nks.Recompute(), nks.Transposed(), nks.FiniteDifference(), nks.Checkpointed()]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_counters_of_other_policies(policy):
    solver = nks.NewtonKrylov(rtol=1e-6, atol=1e-6, policy=policy)
    with COUNTER.measure() as count:
        stats = nks.root_find(arctan, solver, FAR, ARGS).stats
    assert int(stats["num_rejected_steps"]) >= 1
    assert int(stats["num_fn_evals"]) == count.primal
    if not isinstance(policy, nks.FiniteDifference):  # which has no tangent
        assert int(stats["num_matvecs"]) == count.tangent
    trials = 1 + int(stats["num_steps"]) + int(stats["num_rejected_steps"])
    assert int(stats["num_linearisations"]) == trials
    extra = policy.evals_per_matvec * int(stats["num_matvecs"])
    assert count.primal == trials + extra


def test_preconditioner_applications_are_counted():
    applied = Counter()
    built = Counter()

    def build(operator, y, args):
        del operator
        scale = built.tick(1.0 / args["scale"])
        return lambda v: applied.tick(v) * scale

    krylov = nks.GMRES(preconditioner=nks.UserPreconditioner(build))
    solver = nks.NewtonKrylov(rtol=1e-10, atol=1e-10, linear_solver=krylov)
    with applied.measure() as applications, built.measure() as updates, COUNTER.measure() as count:
        stats = nks.root_find(arctan, solver, FAR, ARGS).stats
    assert applications.primal > 0
    assert int(stats["num_preconditioner_applications"]) == applications.primal
    assert int(stats["num_preconditioner_updates"]) == updates.primal
    assert int(stats["num_matvecs"]) == count.tangent
    assert int(stats["num_fn_evals"]) == count.primal


# --- derivatives ----------------------------------------------------------------------------

FIRST_ORDER = {
    "grad": lambda args: jax.grad(loss)(args),
    "value_and_grad": lambda args: jax.value_and_grad(loss)(args),
    "vjp": lambda args: jax.vjp(lambda a: solve(a).value, args)[1](jnp.arange(1.0, N + 1)),
    "jvp": lambda args: jax.jvp(lambda a: solve(a).value, (args,), (DIRECTION,)),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", list(FIRST_ORDER))
def test_first_derivatives_add_no_evaluation(name, jit):
    transformed = eqx.filter_jit(FIRST_ORDER[name]) if jit else FIRST_ORDER[name]
    count = evaluations(transformed, ARGS)
    plain = forward()[1]
    assert count.primal == plain.primal
    if name == "jvp":
        assert count.tangent > plain.tangent and count.transposed == 0
    else:
        # the solve's matvecs, and at most one to split the joint map; in reverse the adjoint's
        # matvecs, and one for the cotangent of args
        assert plain.tangent <= count.tangent <= plain.tangent + 1
        assert count.transposed >= 3


def _hvp(args):
    return jax.jvp(jax.grad(loss), (args,), (DIRECTION,))


def _third(args):
    along = lambda fn: lambda a: jax.jvp(fn, (a,), (DIRECTION,))[1]
    return jax.grad(along(along(loss)))(args)


@pytest.mark.parametrize(
    ("transformed", "more"),
    [(_hvp, 1), (jax.hessian(loss), 1), (_third, 2)],
    ids=["jvp of grad", "hessian", "third"],
)
def test_each_further_order_adds_at_most_one(transformed, more):
    count = evaluations(eqx.filter_jit(transformed), ARGS)
    plain = forward()[1].primal
    assert plain <= count.primal <= plain + more


def test_relinearise_evaluates_once_more():
    adjoint = nks.KrylovAdjoint(reuse=nks.Relinearise())
    with COUNTER.measure() as count:
        derivative = eqx.filter_jit(jax.grad(lambda a: loss(a, adjoint=adjoint)))(ARGS)
    assert count.primal == forward()[1].primal + 1
    kept = eqx.filter_jit(jax.grad(loss))(ARGS)
    for name in ARGS:
        np.testing.assert_allclose(derivative[name], kept[name], rtol=1e-8)


def test_optimistix_driver_counts_the_same():
    plain = forward()[1]

    def driven(args, **kwargs):
        return optx.root_find(lambda y, args: arctan(y, args), SOLVER, FAR, args, **kwargs)

    with COUNTER.measure() as count:
        solution = eqx.filter_jit(driven)(ARGS)
    np.testing.assert_allclose(solution.value, forward()[0].value, rtol=1e-9, atol=1e-10)
    assert count.primal == plain.primal
    assert count.tangent == plain.tangent
    assert int(solution.stats["num_fn_evals"]) == count.primal
    value = lambda args: jnp.sum(driven(args, adjoint=nks.KrylovAdjoint()).value)
    with COUNTER.measure() as count:
        eqx.filter_jit(jax.grad(value))(ARGS)
    assert count.primal == plain.primal + 1


# --- batches --------------------------------------------------------------------------------


def test_counters_of_each_lane():
    """A lane's counters are those of the lane alone, which are what is counted alone."""
    starts = jnp.stack([0.1 * FAR, 0.4 * FAR, FAR])
    run = eqx.filter_jit(lambda y0: nks.root_find(arctan, SOLVER, y0, ARGS, throw=False))
    with COUNTER.measure() as batch:
        together = eqx.filter_jit(jax.vmap(lambda y0: _stats(run(y0))))(starts)
    evals = []
    for lane, y0 in enumerate(starts):
        with COUNTER.measure() as count:
            alone = _stats(run(y0))
        assert int(alone["num_fn_evals"]) == count.primal
        assert int(alone["num_matvecs"]) == count.tangent
        for name, value in alone.items():
            assert int(together[name][lane]) == int(value), (lane, name)
        evals.append(count.primal)
    assert len(set(evals)) == 3
    # As many evaluations of the batch as the slowest lane needs.
    assert batch.primal == max(evals)
    assert weighted(batch, "primal") == 3 * max(evals)


def _stats(solution):
    return {k: v for k, v in solution.stats.items() if k.startswith("num_")}


# --- compilations ---------------------------------------------------------------------------


def _traced_residual():
    """A residual and a list with one entry for each time that Python runs it."""
    traces = []

    def fn(y, args):
        traces.append(None)
        return y + 0.1 * jnp.tanh(y) * args["scale"] - args["b"]

    return fn, traces


def _again():
    return tree.scale(1.3, ARGS)


def test_compiled_once_for_each_structure():
    fn, traces = _traced_residual()
    nks.root_find(fn, SOLVER, jnp.zeros(N), ARGS)
    first = len(traces)
    assert 1 <= first <= 2
    nks.root_find(fn, SOLVER, jnp.ones(N), _again())
    # an equal solver, made anew, is the same structure
    other = nks.NewtonKrylov(rtol=1e-10, atol=1e-10)
    nks.root_find(fn, other, jnp.ones(N), _again())
    assert len(traces) == first
    nks.root_find(lambda y, args: fn(y, args), SOLVER, jnp.ones(N), _again())
    assert len(traces) > first  # another function object is another program


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_gradients_are_compiled_once(jit):
    fn, traces = _traced_residual()
    grad = jax.grad(lambda a: jnp.sum(nks.root_find(fn, SOLVER, jnp.zeros(N), a).value))
    grad = eqx.filter_jit(grad) if jit else grad
    grad(ARGS)
    first = len(traces)
    assert 1 <= first <= 2
    grad(_again())
    assert len(traces) == first


def test_traced_tolerances_compile_nothing_again():
    fn, traces = _traced_residual()
    find = lambda tol: nks.root_find(fn, nks.NewtonKrylov(rtol=tol, atol=tol), jnp.zeros(N), ARGS)
    loose = find(jnp.array(1e-2))
    first = len(traces)
    tight = find(jnp.array(1e-12))
    assert len(traces) == first
    assert int(tight.stats["num_steps"]) > int(loose.stats["num_steps"])

"""Every policy on every kind of y: the maps are what `jax.jvp` and `jax.vjp` say."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nksolve import tree
from nksolve.linearise.linearisation import linearise
from nksolve.linearise.policies import Checkpointed, FiniteDifference, Linearise, Recompute
from tests.helpers import Counter
from tests.linearise.cases import (
    CASES,
    POLICIES,
    WITH_ADJOINT,
    Case,
    arrays_of,
    assert_close,
    flat,
    like,
    on_arrays,
    product,
)

_ids = lambda x: x.name if isinstance(x, Case) else type(x).__name__
_each_case = pytest.mark.parametrize("case", CASES, ids=_ids)
_each_policy = pytest.mark.parametrize("policy", POLICIES, ids=_ids)
_each_adjoint = pytest.mark.parametrize("policy", WITH_ADJOINT, ids=_ids)


@eqx.filter_jit
def _made(fn, y, args, policy):
    lin = linearise(fn, y, args, policy=policy)
    v, w = like(lin.operator.in_structure(), 1), like(lin.operator.out_structure(), 2)
    dargs = like(arrays_of(args), 3)
    forward = lin.value, lin.operator.mv(v), lin.args_tangent(dargs)
    if isinstance(policy, FiniteDifference):
        return v, w, dargs, forward, None
    return v, w, dargs, forward, (lin.operator.transpose().mv(w), lin.args_cotangent(w))


@_each_policy
@_each_case
def test_forward(case, policy):
    v, _, dargs, (value, jv, kda), _ = _made(case.fn, case.y, case.args, policy)
    y, args = arrays_of(case.y), arrays_of(case.args)
    fn = on_arrays(case)
    f, expected = jax.jvp(lambda y: fn(y, args), (y,), (v,))
    assert_close(value, f, case.rtol(Linearise()))
    assert_close(jv, expected, case.rtol(policy))
    _, expected = jax.jvp(lambda args: fn(y, args), (args,), (dargs,))
    # With no args at all the reference is exactly zero.
    assert_close(kda, expected, case.rtol(policy))


@_each_adjoint
@_each_case
def test_reverse(case, policy):
    _, w, _, _, (jtw, ktw) = _made(case.fn, case.y, case.args, policy)
    y, args = arrays_of(case.y), arrays_of(case.args)
    _, vjp = jax.vjp(on_arrays(case), y, args)
    expected_y, expected_args = vjp(w)
    assert_close(jtw, expected_y, case.rtol(policy))
    assert_close(ktw, expected_args, case.rtol(policy))


@_each_adjoint
@_each_case
def test_dot(case, policy):
    v, w, dargs, (_, jv, kda), (jtw, ktw) = _made(case.fn, case.y, case.args, policy)
    # A map that is only real-linear has a transpose with respect to Re(aᵀb).
    part = (lambda x: x) if case.holomorphic else np.real
    scale = np.linalg.norm(flat(jv)) * np.linalg.norm(flat(w))
    assert abs(part(product(w, jv) - product(jtw, v))) <= case.rtol(policy) * scale
    scale = np.linalg.norm(flat(kda)) * np.linalg.norm(flat(w))
    assert abs(part(product(w, kda) - product(ktw, dargs))) <= case.rtol(policy) * scale


@_each_policy
def test_without_jit(policy):
    case = CASES[0]
    lin = linearise(case.fn, case.y, case.args, policy=policy)
    v = like(case.y, 1)
    _, expected = jax.jvp(lambda y: case.fn(y, case.args), (case.y,), (v,))
    assert_close(lin.operator.mv(v), expected, case.rtol(policy))


@_each_policy
def test_aux(policy):
    def fn(y, args):
        return y**2, {"sum": jnp.sum(y), "name": "held", "count": 3}

    lin = linearise(fn, jnp.arange(3.0), has_aux=True, policy=policy)
    assert lin.aux["sum"] == 3.0 and lin.aux["name"] == "held" and lin.aux["count"] == 3
    np.testing.assert_allclose(lin.operator.mv(jnp.ones(3)), [0.0, 2.0, 4.0], atol=1e-7)
    assert linearise(lambda y, _: y, jnp.ones(3), policy=policy).aux is None


@pytest.mark.parametrize("policy", POLICIES, ids=_ids)
def test_evaluations(policy):
    """One evaluation makes the linearisation; matvecs make as many as the policy says."""
    counter = Counter()
    w = jnp.linspace(0.5, 1.5, 6)

    def fn(y, args):
        # The nonlinear part hangs on the counted value, so that recomputing it is seen.
        return jnp.sin(counter.tick(y) * args) ** 2

    y, v = jnp.linspace(-1.0, 1.0, 6), jnp.linspace(2.0, 1.0, 6)
    with counter.measure() as count:
        lin = eqx.filter_jit(lambda y, w: linearise(fn, y, w, policy=policy))(y, w)
    assert count.primal == 1
    mv = eqx.filter_jit(lambda operator, v: operator.mv(v))
    with counter.measure() as count:
        for _ in range(3):
            v = mv(lin.operator, v)
    assert count.primal == 3 * policy.evals_per_matvec
    if isinstance(policy, FiniteDifference):
        return
    assert count.tangent == 3
    with counter.measure() as count:
        mv(lin.operator.transpose(), v)
    assert count.primal == policy.evals_per_matvec and count.transposed == 1
    with counter.measure() as count:
        eqx.filter_jit(lambda lin, v: lin.args_cotangent(v))(lin, v)
    assert count.primal == policy.evals_per_matvec


def test_only_linearising_never_evaluates_twice_without_jit():
    counter = Counter()
    with counter.measure() as count:
        lin = linearise(lambda y, a: jnp.sin(counter.tick(y) * a), jnp.ones(3), jnp.ones(3))
        lin.operator.mv(jnp.ones(3))
        lin.operator.transpose().mv(jnp.ones(3))
        lin.args_cotangent(jnp.ones(3))
    assert count.primal == 1


def test_pruned_map_keeps_and_reads_nothing_of_the_parameters():
    """J keeps no zeros for the tangents of args, and no value that only those need."""
    network = eqx.nn.MLP(5, 5, 7, 3, activation=jnp.tanh, key=jax.random.key(0))
    y = jnp.ones((3, 5))
    lin = linearise(lambda y, net: jax.vmap(net)(y), y, network)
    alone = linearise(lambda y, _: jax.vmap(network)(y), y)

    def sizes(operator):
        return sorted(x.size for x in jax.tree.leaves(operator) if eqx.is_array(x))

    assert sizes(lin.operator) == sizes(alone.operator)
    jaxpr = jax.make_jaxpr(lin.operator.mv)(y)
    assert "add_any" not in str(jaxpr)


def test_recompute_stores_the_point_only():
    case = CASES[0]
    lin = linearise(case.fn, case.y, case.args, policy=Recompute())
    kept = {id(x) for x in jax.tree.leaves(lin.operator) if eqx.is_inexact_array(x)}
    given = {id(x) for x in jax.tree.leaves((case.y, case.args))}
    assert kept <= given


def test_finite_difference_step_and_transpose():
    fn = lambda y, _: jnp.exp(y)
    y, v = jnp.linspace(0.0, 1.0, 5), jnp.linspace(1.0, -1.0, 5)
    exact = jnp.exp(y) * v
    errors = [
        float(tree.norm2(linearise(fn, y, policy=policy).operator.mv(v) - exact))
        for policy in (FiniteDifference(1e-3), FiniteDifference(1e-4), FiniteDifference())
    ]
    # First order in the step, and the default close to the best that one difference can do.
    assert 8 < errors[0] / errors[1] < 12
    assert errors[2] < 1e-6
    lin = linearise(fn, y, policy=FiniteDifference())
    with pytest.raises(NotImplementedError, match="Transposed"):
        lin.operator.transpose().mv(v)
    with pytest.raises(NotImplementedError, match="no gradient"):
        lin.args_cotangent(v)
    assert not np.any(lin.operator.mv(jnp.zeros(5)))


def test_checkpoint_policy_of_the_user():
    """`Checkpointed(everything)` keeps what `Linearise` keeps: nothing is computed again."""
    counter = Counter()
    policy = Checkpointed(jax.checkpoint_policies.everything_saveable)
    lin = linearise(lambda y, _: jnp.sin(counter.tick(y)), jnp.ones(3), policy=policy)
    with counter.measure() as count:
        out = eqx.filter_jit(lambda o, v: o.mv(v))(lin.operator, jnp.ones(3))
    assert (count.primal, count.tangent) == (0, 1)
    np.testing.assert_allclose(out, np.cos(np.ones(3)), rtol=1e-14)

"""A linearisation traced once: right at every point, and only what depends on y is kept."""

import equinox as eqx
import jax
import jax.extend.core as jec
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

from nksolve.linearise.inspect import LinearisationError
from nksolve.linearise.linearisation import linearise
from nksolve.linearise.policies import Checkpointed, Linearise, Recompute, Transposed
from nksolve.linearise.split import SplitJaxpr, distinct, inline
from nksolve.linearise.trace import LinearisedProgram, trace
from tests.helpers import Counter
from tests.linearise.cases import (
    CASES,
    WITH_ADJOINT,
    Case,
    arrays_of,
    assert_close,
    like,
)

_ids = lambda x: x.name if isinstance(x, Case) else x if isinstance(x, str) else type(x).__name__
_each_adjoint = pytest.mark.parametrize("policy", WITH_ADJOINT, ids=_ids)


def _program(fn, y, args, policy, *, has_aux=False):
    """The linearised program, active in the inexact parameters, and those parameters."""
    program, params = trace(fn, y, args, has_aux=has_aux)
    active = [eqx.is_inexact_array(p) for p in params]
    return LinearisedProgram(program, arrays_of(y), params, active, policy), params


@pytest.mark.parametrize("policy", [Linearise(), Transposed()], ids=_ids)
@pytest.mark.parametrize("case", CASES, ids=_ids)
def test_equals_linearise_at_other_points(case, policy):
    """Traced at one point and set of parameters, used at others."""
    linearised, params = _program(case.fn, case.y, case.args, policy)
    at = linearised.at(params)
    _, static_y = eqx.partition(case.y, eqx.is_inexact_array)

    @eqx.filter_jit
    def both(y):
        traced = linearise(at, y)
        direct = linearise(case.fn, eqx.combine(y, static_y), case.args, policy=policy)
        v, w = like(direct.operator.in_structure(), 1), like(direct.operator.out_structure(), 2)
        return [
            (lin.value, lin.operator.mv(v), lin.operator.transpose().mv(w))
            for lin in (traced, direct)
        ]

    for seed in (3, 4):
        actual, expected = both(like(arrays_of(case.y), seed))
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, case.rtol(policy))


def test_other_parameters():
    case = CASES[0]
    linearised, params = _program(case.fn, case.y, case.args, Linearise())
    others = [2 * p if eqx.is_inexact_array(p) else p for p in params]
    args = jtu.tree_map(lambda x: 2 * x if eqx.is_inexact_array(x) else x, case.args)
    v = like(case.y, 1)
    actual = linearise(linearised.at(others), case.y).operator.mv(v)
    assert_close(actual, linearise(case.fn, case.y, args).operator.mv(v), 1e-13)


def test_joint_map_and_aux():
    """The joint map takes tangents of the active parameters, and aux is differentiated with f."""

    def fn(y, args):
        scale, shift, n = args
        return scale * y**2 + shift, {"norm": jnp.sum(y * scale), "n": n, "name": "held"}

    y, args = jnp.linspace(1.0, 2.0, 3), (jnp.full(3, 3.0), jnp.ones(3), jnp.array(5))
    program, params = trace(fn, y, args, has_aux=True)
    assert [p.shape for p in params] == [(3,), (3,), ()]
    linearised = LinearisedProgram(program, y, params, [True, False, False], Linearise())
    lin = linearise(linearised.at(params), y)
    np.testing.assert_allclose(lin.value, 3 * y**2 + 1)
    aux = program.complete(lin.aux)
    assert aux["name"] == "held" and aux["n"] == 5
    np.testing.assert_allclose(aux["norm"], 3 * np.sum(y))
    np.testing.assert_allclose(lin.operator.mv(jnp.ones(3)), 6 * y)
    dy, dscale = jnp.ones(3), jnp.array([1.0, 2.0, 3.0])
    df, daux = lin.joint.mv((dy, [dscale]))
    np.testing.assert_allclose(df, 6 * y * dy + dscale * y**2)
    np.testing.assert_allclose(daux["norm"], np.sum(3 * dy + y * dscale))


def test_has_aux_wants_a_pair():
    with pytest.raises(TypeError, match="pair"):
        trace(lambda y, _: y, jnp.ones(2), None, has_aux=True)


def test_closed_over_arrays_are_parameters():
    """Tracers that fn closes over become parameters: differentiation goes through them."""

    def solve_like(w):
        linearised, params = _program(lambda y, _: jnp.sin(w * y), jnp.ones(3), None, Linearise())
        operator = linearise(linearised.at(params), jnp.ones(3)).operator
        return jnp.sum(operator.mv(jnp.ones(3)))

    w = jnp.linspace(0.5, 1.0, 3)
    expected = jax.grad(lambda w: jnp.sum(w * jnp.cos(w)))(w)
    np.testing.assert_allclose(jax.jit(jax.grad(solve_like))(w), expected, rtol=1e-14)


# --- hot and cold ---------------------------------------------------------------------------


def _network(activation=jnp.tanh):
    return eqx.nn.MLP(11, 11, 64, 2, activation=activation, key=jr.key(0))


@pytest.mark.parametrize("policy", [Linearise(), Transposed(), Recompute()], ids=_ids)
def test_weights_are_cold(policy):
    network, y = _network(), jnp.linspace(-1.0, 1.0, 11)
    linearised, params = _program(lambda y, net: net(y) - y, y, network, policy)
    _, kept = linearised.evaluate(linearised.at(params).cold, y)
    assert max(x.size for x in kept) <= 64
    assert sum(x.size for x in kept) < 10 * 64
    total = sum(x.size for x in params)
    assert total > 5000


def test_checkpointed_weights_are_cold():
    network, y = _network(), jnp.linspace(-1.0, 1.0, 11)
    linearised, params = _program(lambda y, net: net(y) - y, y, network, Checkpointed())
    _, kept = linearised.evaluate(linearised.at(params).cold, y)
    assert [x.shape for x in kept] == [(11,)]


@_each_adjoint
def test_cold_outputs_are_the_same_at_every_point(policy):
    """What is not kept may be computed before the loop: it does not hang on y."""
    network = _network()
    linearised, params = _program(lambda y, net: net(y) - y, jnp.ones(11), network, policy)
    at = linearised.at(params)
    kept = [linearised.evaluate(at.cold, like(jnp.ones(11), seed))[1] for seed in (1, 2)]
    assert all(np.any(a != b) for a, b in zip(*kept, strict=True))
    # Grafting the kept arrays of a point onto the cold ones gives the maps of that point.
    for seed, arrays in zip((1, 2), kept, strict=True):
        y, v = like(jnp.ones(11), seed), like(jnp.ones(11), 7)
        jacobian, _ = linearised.maps(at.cold, arrays)
        _, expected = jax.jvp(lambda y: network(y) - y, (y,), (v,))
        np.testing.assert_allclose(jacobian.mv(v)[0], expected, rtol=1e-12)


def test_keeping():
    linearised, params = _program(lambda y, a: a * y**2, jnp.ones(3), jnp.ones(3), Linearise())
    at = linearised.at(params)
    aux, kept = linearise(at.keeping(), jnp.arange(3.0)).aux
    assert aux is None and linearise(at, jnp.arange(3.0)).aux is None
    jacobian, _ = linearised.maps(at.cold, kept)
    np.testing.assert_allclose(jacobian.mv(jnp.ones(3))[0], [0.0, 2.0, 4.0])


def test_counts():
    """Tracing evaluates nothing; a point costs one evaluation; a matvec none."""
    counter = Counter()
    fn = lambda y, a: jnp.sin(counter.tick(y) * a)
    y = jnp.ones(3)
    with counter.measure() as count:
        linearised, params = _program(fn, y, y, Linearise())
        at = linearised.at(params)
    assert count.primal == 0
    with counter.measure() as count:
        lin = linearise(at, 2 * y)
    assert count.primal == 1
    with counter.measure() as count:
        lin.operator.mv(y)
        lin.operator.transpose().mv(y)
        lin.joint.mv((y, [y]))
    assert count.primal == 0


def test_refused_while_tracing():
    fn = lambda y, _: jax.lax.while_loop(lambda c: jnp.sum(c) < 9.0, lambda c: c * 2, y)
    with pytest.raises(LinearisationError, match="while_loop"):
        _program(fn, jnp.ones(3), None, Linearise())


@pytest.mark.parametrize(
    ("loop", "policy"),
    [
        ("while", Linearise()),
        ("scan", Linearise()),
        ("scan", Checkpointed()),
        ("fori", Recompute()),
        ("scan", Transposed()),
    ],
    ids=_ids,
)
def test_operator_carried_through_a_loop(loop, policy):
    """An operator of a traced program has one static part: its arrays are a loop's carry."""
    fn = lambda y, a: jnp.sin(a * y) + y**2
    y, a = jnp.linspace(0.1, 0.3, 3), jnp.linspace(1.0, 2.0, 3)
    linearised, params = _program(fn, y, a, policy)
    at = linearised.at(params)
    first, static = eqx.partition(linearise(at, y).operator, eqx.is_array)

    def body(carry):
        # A lagged matvec: the operator of the last point is applied, then the new one is made.
        y, arrays = carry
        y = y + 0.1 * eqx.combine(arrays, static).mv(y)
        return y, eqx.filter(linearise(at, y).operator, eqx.is_array)

    def run(y, first):
        if loop == "scan":
            return jax.lax.scan(lambda c, _: (body(c), None), (y, first), None, length=3)[0]
        if loop == "fori":
            return jax.lax.fori_loop(0, 3, lambda _, c: body(c), (y, first))
        again = lambda c: (c[0] + 1, body(c[1]))
        return jax.lax.while_loop(lambda c: c[0] < 3, again, (0, (y, first)))[1]

    end, arrays = jax.jit(run)(y, first)
    expected = y
    for _ in range(3):
        expected = expected + 0.1 * jax.jvp(lambda y: fn(y, a), (expected,), (expected,))[1]
    np.testing.assert_allclose(end, expected, rtol=1e-13)
    operator = eqx.combine(arrays, static)
    jacobian = jax.jacfwd(lambda y: fn(y, a))(expected)
    np.testing.assert_allclose(operator.as_matrix(), jacobian, rtol=1e-12)
    solved = jax.jit(lambda arrays, b: eqx.combine(arrays, static).transpose().mv(b))(arrays, y)
    np.testing.assert_allclose(solved, jacobian.T @ y, rtol=1e-12)


# --- split.py -------------------------------------------------------------------------------


def test_inline():
    inner = jax.jit(lambda x: jax.jit(jnp.sin)(x) * 2)
    fn = lambda x: jax.lax.cond(x[0] > 0, jax.jit(jnp.cos), jnp.sin, inner(x) + 1)
    x = jnp.linspace(0.5, 1.0, 3)
    closed = jax.make_jaxpr(fn)(x)
    flat = inline(closed)
    names = lambda c: [eqn.primitive.name for eqn in c.jaxpr.eqns]
    assert "jit" in names(closed) and "jit" not in names(flat)
    np.testing.assert_array_equal(jec.jaxpr_as_fun(flat)(x)[0], fn(x))


def test_inline_keeps_rules():
    """Custom rules, scans and remat survive the interpreter and can still be differentiated."""

    def fn(x):
        y = jax.nn.relu(x) + jax.checkpoint(jnp.sin)(x)
        return jax.lax.scan(lambda c, z: (c * z, c), y, jnp.stack([x, x]))[0]

    x = jnp.linspace(-1.0, 1.0, 4)
    flat = jec.jaxpr_as_fun(inline(jax.make_jaxpr(fn)(x)))
    np.testing.assert_allclose(
        jax.jacrev(lambda x: flat(x)[0])(x), jax.jacfwd(fn)(x), rtol=1e-14, atol=1e-14
    )


def test_inline_keeps_custom_vjp():
    @jax.custom_vjp
    def fn(x):
        return x

    fn.defvjp(lambda x: (x, None), lambda _, ct: (3 * ct,))
    flat = jec.jaxpr_as_fun(inline(jax.make_jaxpr(lambda x: jax.jit(fn)(x) * 2)(jnp.ones(2))))
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(flat(x)[0]))(jnp.ones(2)), [6.0, 6.0])


def test_split():
    def fn(y, a, b):
        cold = jnp.exp(a) @ b
        return y * cold, cold, jnp.sin(a), 2.0, y

    y, a, b = jnp.ones(3), jnp.eye(3), jnp.arange(3.0)
    split = SplitJaxpr(inline(jax.make_jaxpr(fn)(y, a, b)), 1)
    assert split.hot_out == [True, False, False, False, True]
    cold = split.cold([a, b])
    for y in (jnp.ones(3), jnp.arange(3.0)):
        for out, expected in zip(split.hot(cold, [y]), fn(y, a, b), strict=True):
            np.testing.assert_array_equal(out, expected)
    outputs = split.cold_outputs(cold)
    assert outputs[0] is None and outputs[4] is None
    np.testing.assert_array_equal(outputs[2], jnp.sin(a))
    # The expensive part is done once: the hot phase has no exp and no matrix in it.
    assert "exp" not in str(jax.make_jaxpr(lambda y: split.hot(cold, [y]))(y))


def test_distinct():
    def fn(x):
        y = jnp.sin(x)
        return x, y, y, x, y + 1, y

    closed, places = distinct(jax.make_jaxpr(fn)(jnp.ones(2)), 1)
    outputs = jec.jaxpr_as_fun(closed)(jnp.arange(2.0))
    assert len(outputs) == 1 + 3 and places == [0, 0, 1, 2, 0]
    expected = fn(jnp.arange(2.0))
    for place, e in zip(places, expected[1:], strict=True):
        np.testing.assert_array_equal(outputs[1 + place], e)

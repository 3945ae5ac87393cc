"""What cannot be linearised is refused with a text that helps; what can is let through."""

from pathlib import Path

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from nksolve.linearise.inspect import LinearisationError, check_unknown
from nksolve.linearise.linearisation import linearise
from nksolve.linearise.policies import (
    Checkpointed,
    FiniteDifference,
    Linearise,
    Recompute,
    Transposed,
)
from tests.linearise.cases import POLICIES

_name = lambda policy: type(policy).__name__
_storing = pytest.mark.parametrize("policy", [Linearise(), Checkpointed(), Transposed()], ids=_name)
_forward = pytest.mark.parametrize("policy", [Linearise(), Checkpointed(), Recompute()], ids=_name)
_every = pytest.mark.parametrize("policy", POLICIES, ids=_name)

Y = jnp.linspace(0.5, 1.0, 3)


def _double_until(x, limit=10.0):
    return jax.lax.while_loop(lambda c: jnp.sum(c) < limit, lambda c: c * 2, x)


@jax.custom_vjp
def _backward_only(x):
    return jnp.sin(x)


_backward_only.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * jnp.cos(x),))


# --- leaves ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "place", "advice"),
    [
        ({"a": jnp.ones(2), "b": jnp.arange(3)}, r"y\['b'\]", "int64.*static field"),
        ([np.arange(3)], r"y\[0\]", "args"),
        ((jnp.ones(2), jnp.array([True])), r"y\[1\]", "bool"),
        ({"n": 3}, r"y\['n'\]", "Python integer.*static"),
        ({"x": 3.0}, r"y\['x'\]", "jnp.asarray"),
        (eqx.nn.Dropout(0.5), r"y\.p", "jnp.asarray"),
    ],
)
def test_unknown_refused(y, place, advice):
    with pytest.raises(TypeError, match=f"(?s)(?=.*{place})(?=.*{advice})"):
        linearise(lambda y, _: jnp.ones(2), y)


def test_unknown_accepted():
    key = jax.random.key(0)
    check_unknown({"f": jnp.tanh, "s": "text", "n": None, "flag": True, "key": key, "x": Y})
    check_unknown(
        [np.ones(3), np.float64(1.0), jnp.ones(2, jnp.complex64), jnp.ones(1, jnp.float16)]
    )
    check_unknown(None)


@_every
def test_residual_refused(policy):
    with pytest.raises(TypeError, match=r"(?s)int64.*f\['b'\]"):
        linearise(lambda y, _: {"a": y, "b": jnp.arange(3)}, Y, policy=policy)
    with pytest.raises(TypeError, match=r"(?s)str.*f\[1\]"):
        linearise(lambda y, _: (y, "text"), Y, policy=policy)


@_every
def test_residual_accepted(policy):
    lin = linearise(lambda y, _: (jnp.sum(y), 1.0, None), Y, policy=policy)
    total, one, _ = lin.operator.mv(jnp.ones(3))
    np.testing.assert_allclose(total, 3.0, rtol=1e-6)
    assert lin.value[1] == 1.0 and one == 0.0


# --- loops ----------------------------------------------------------------------------------


@_storing
def test_while_loop_refused(policy):
    with pytest.raises(LinearisationError) as error:
        linearise(lambda y, _: _double_until(y), Y, policy=policy)
    text = str(error.value)
    assert f"{__file__}:" in text and "_double_until" in text
    line = int(text.split(f"{__file__}:")[1].split(",")[0])
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert "while_loop(lambda c" in source[line - 1]
    for way in ("scan", "bounded", "custom_root", "root_find", "Recompute()", "FiniteDifference()"):
        assert way in text
    assert f"nks.{_name(policy)}()" in text


def _in_scan(y):
    return jax.lax.scan(lambda c, x: (_double_until(c), x), y, jnp.arange(2))[0]


def _through_scan_carry(y):
    # The loop sees y only from the second trip on, through two places of the carry.
    def body(carry, _):
        a, b, c = carry
        return (y, a, _double_until(b) + c), None

    zero = jnp.ones(3)
    return jax.lax.scan(body, (zero, zero, zero), None, length=4)[0][2]


def _in_cond(y):
    return jax.lax.cond(jnp.sum(y) > 0, _double_until, lambda x: x, y)


def _as_body_constant(y):
    return jax.lax.while_loop(lambda c: jnp.sum(c) < 9.0, lambda c: c + y, jnp.ones(3))


@pytest.mark.parametrize(
    "fn",
    [
        jax.jit(_double_until),
        jax.checkpoint(_double_until),
        jax.vmap(_double_until),
        _in_scan,
        _through_scan_carry,
        _in_cond,
        _as_body_constant,
        jax.vmap(lambda y: eqxi.while_loop(lambda c: c < 5.0, lambda c: 2 * c, y, kind="lax")),
    ],
    ids=["jit", "remat", "vmap", "scan", "scan-carry", "cond", "body-const", "equinox-lax"],
)
def test_while_loop_found_inside(fn):
    with pytest.raises(LinearisationError, match="while_loop"):
        linearise(lambda y, _: fn(y), Y)
    # Each of them does have a derivative: it is storing it that fails.
    _, expected = jax.jvp(fn, (Y,), (Y,))
    forward = linearise(lambda y, _: fn(y), Y, policy=Recompute())
    np.testing.assert_allclose(forward.operator.mv(Y), expected, rtol=1e-14)
    differenced = linearise(lambda y, _: fn(y), Y, policy=FiniteDifference())
    np.testing.assert_allclose(differenced.operator.mv(Y), expected, rtol=1e-5)


def _rule_of_its_own(x):
    @jax.custom_jvp
    def root(x):
        return jax.lax.while_loop(
            lambda z: jnp.any(jnp.abs(z * z - x) > 1e-12), lambda z: 0.5 * (z + x / z), x
        )

    @root.defjvp
    def _(primals, tangents):
        z = root(*primals)
        return z, tangents[0] / (2 * z)

    return root(x)


def _custom_root(x):
    return jax.lax.custom_root(
        lambda z: z * z - x,
        x,
        lambda f, z: _rule_of_its_own(x),
        lambda g, b: b / g(jnp.ones_like(b)),
    )


def _inner_solve(x):
    structure = jax.ShapeDtypeStruct((3,), jnp.float64)
    operator = lx.FunctionLinearOperator(lambda v: v * (1 + x * x), structure)
    return lx.linear_solve(operator, x, lx.GMRES(1e-12, 1e-12)).value


def _conjugate_gradients(x):
    return jax.scipy.sparse.linalg.cg(lambda v: v * (1 + x * x), x, tol=1e-14)[0]


@pytest.mark.parametrize(
    "fn",
    [
        lambda y, args: y * _double_until(args),
        lambda y, args: y * jax.lax.fori_loop(0, 3, lambda _, c: c * y, args),
        lambda y, args: y + _double_until(jnp.floor(3 * y)),
        lambda y, args: y + _double_until(jax.lax.stop_gradient(y)),
        lambda y, args: y * _double_until(jnp.argmax(y) + 1, 10).astype(y.dtype),
        # Only when to stop depends on y: the trips are piecewise constant, no tangent enters.
        lambda y, args: y + _double_until(args, jnp.sum(y) + 3.0),
        lambda y, args: eqxi.while_loop(
            lambda c: jnp.sum(c) < 9.0, lambda c: c * 2, y, kind="bounded", max_steps=5
        ),
        lambda y, args: _rule_of_its_own(y),
        lambda y, args: _custom_root(y),
        lambda y, args: _inner_solve(y),
        lambda y, args: _conjugate_gradients(y),
        lambda y, args: _backward_only(args) * y,
    ],
    ids=[
        "args",
        "fori",
        "floor",
        "stop-gradient",
        "integer",
        "predicate",
        "bounded",
        "custom-jvp",
        "custom-root",
        "lineax",
        "custom-linear-solve",
        "custom-vjp-of-args",
    ],
)
def test_harmless(fn):
    """Let through, right, and with no loop that y moves in the matvec."""
    args = jnp.linspace(0.1, 0.2, 3)
    lin = linearise(lambda y, args: fn(y, jax.lax.stop_gradient(args)), Y, args)
    _, expected = jax.jvp(lambda y: fn(y, args), (Y,), (Y,))
    np.testing.assert_allclose(lin.operator.mv(Y), expected, rtol=1e-10)
    _, vjp = jax.vjp(lambda y: fn(y, args), Y)
    np.testing.assert_allclose(lin.operator.transpose().mv(Y), vjp(Y)[0], rtol=1e-10)


def test_loop_on_args_stays_out_of_the_matvec():
    lin = linearise(lambda y, args: y * _double_until(args), Y, jnp.linspace(0.1, 0.2, 3))
    assert "while" not in str(jax.make_jaxpr(lin.operator.mv)(Y))
    assert "while" not in str(jax.make_jaxpr(lin.operator.transpose().mv)(Y))


# --- custom_vjp -----------------------------------------------------------------------------


def _checkpointed_loop(y):
    return eqxi.while_loop(
        lambda c: jnp.sum(c) < 9.0, lambda c: c * 2, y, kind="checkpointed", max_steps=16
    )


_REVERSE_ONLY = {
    "plain": _backward_only,
    "jit": jax.jit(_backward_only),
    "scan": lambda y: jax.lax.scan(lambda c, _: (_backward_only(c), None), y, None, length=2)[0],
    "equinox-checkpointed": _checkpointed_loop,
}
_reverse_only = pytest.mark.parametrize("fn", _REVERSE_ONLY.values(), ids=_REVERSE_ONLY)


@_forward
@_reverse_only
def test_custom_vjp_refused(fn, policy):
    with pytest.raises(LinearisationError, match=r"(?s)custom_vjp.*nks\.Transposed\(\)"):
        linearise(lambda y, _: fn(y), Y, policy=policy)


def test_custom_vjp_is_named():
    with pytest.raises(LinearisationError) as error:
        linearise(lambda y, _: _backward_only(y), Y)
    text = str(error.value)
    assert "`_backward_only`" in text and text.count(__file__) == 2


@pytest.mark.parametrize(
    "fn",
    [f for f in _REVERSE_ONLY.values() if f is not _checkpointed_loop],
    ids=[name for name in _REVERSE_ONLY if name != "equinox-checkpointed"],
)
def test_custom_vjp_transposed(fn):
    lin = linearise(lambda y, _: fn(y), Y, policy=Transposed())
    jacobian = jax.jacrev(fn)(Y)
    np.testing.assert_allclose(lin.operator.mv(Y), jacobian @ Y, rtol=1e-14)
    np.testing.assert_allclose(lin.operator.transpose().mv(Y), jacobian.T @ Y, rtol=1e-14)
    differenced = linearise(lambda y, _: fn(y), Y, policy=FiniteDifference())
    np.testing.assert_allclose(differenced.operator.mv(Y), jacobian @ Y, rtol=1e-6)


def test_reverse_rule_with_a_loop():
    """Equinox's checkpointed loop pulls cotangents back in a loop, which has no transpose."""
    with pytest.raises(LinearisationError, match=r'(?s)reverse rule.*kind="bounded"') as error:
        linearise(lambda y, _: _checkpointed_loop(y), Y, policy=Transposed())
    assert __file__ in str(error.value)
    lin = linearise(lambda y, _: _checkpointed_loop(y), Y, policy=FiniteDifference())
    np.testing.assert_allclose(lin.operator.mv(Y), jax.jacrev(_checkpointed_loop)(Y) @ Y, rtol=1e-6)


def test_custom_vjp_within_a_recomputed_loop():
    def fn(y, _):
        return jax.lax.while_loop(lambda c: jnp.sum(c) > 1.0, lambda c: _backward_only(c) / 2, y)

    with pytest.raises(LinearisationError, match="custom_vjp"):
        linearise(fn, Y, policy=Recompute())


def test_refused_under_transformations():
    fn = lambda y: linearise(lambda y, _: _double_until(y), y).value
    with pytest.raises(LinearisationError):
        jax.jit(fn)(Y)
    with pytest.raises(LinearisationError):
        jax.vmap(fn)(jnp.stack([Y, Y]))
    with pytest.raises(LinearisationError):
        jax.grad(lambda y: jnp.sum(fn(y)))(Y)
    # y and what fn closes over may both be tracers.
    good = jax.jit(lambda y, a: linearise(lambda y, _: y * a, y).operator.mv(y))
    np.testing.assert_allclose(good(Y, Y), Y * Y)

"""Functions with a forward rule of their own, differentiated any number of times."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.rule import ForwardRule


@ForwardRule
def cube_root(x, *, name):
    del name
    # By iterations that no derivative could go through.
    return {"root": jax.lax.while_loop(lambda s: s**3 < x, lambda s: s + 1.0, jnp.zeros(()))}


@cube_root.def_jvp
def _cube_root_jvp(primals, tangents, *, name):
    assert name == "x"
    (x,), (dx,) = primals, tangents
    out = cube_root(x, name=name)
    return out, {"root": dx / (3 * out["root"] ** 2)}


def _root(x):
    return cube_root(x, name="x")["root"]


X = jnp.asarray(27.0)


def test_value_and_derivatives():
    assert _root(X) == 3.0
    assert jax.jit(_root)(X) == 3.0
    np.testing.assert_allclose(jax.grad(_root)(X), 1 / 27, rtol=1e-12)
    np.testing.assert_allclose(jax.jacfwd(_root)(X), 1 / 27, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(jax.grad(_root))(X), -2 / 9 * 3.0**-5, rtol=1e-12)


def test_vmap():
    xs = jnp.array([1.0, 8.0, 27.0])
    np.testing.assert_allclose(jax.vmap(_root)(xs), [1.0, 2.0, 3.0])
    np.testing.assert_allclose(jax.vmap(jax.grad(_root))(xs), [1 / 3, 1 / 12, 1 / 27])
    summed = lambda xs: jnp.sum(jax.vmap(_root)(xs))
    np.testing.assert_allclose(jax.grad(summed)(xs), [1 / 3, 1 / 12, 1 / 27])


def _shifted_by(a):
    @ForwardRule
    def shifted(x, *, by):
        return x + by + a + np.float64(2.0)

    @shifted.def_jvp
    def _(primals, tangents, *, by):
        return shifted(primals[0], by=by), tangents[0]

    return shifted


def test_what_is_held_is_not_differentiated_and_that_is_said():
    stop = jax.lax.stop_gradient
    fn = lambda a: _shifted_by(stop(a))(3.0 * a, by=stop(a))
    value, slope = jax.jvp(fn, (X,), (jnp.ones(()),))
    assert (value, slope) == (137.0, 3.0)
    with pytest.raises(ValueError, match="stop_gradient"):
        jax.grad(lambda a: _shifted_by(a)(3.0 * a, by=stop(a)))(X)
    with pytest.raises(ValueError, match="stop_gradient"):
        jax.grad(lambda a: _shifted_by(stop(a))(3.0 * a, by=a))(X)


def test_a_tangent_that_is_zero_is_none():
    seen = []

    @ForwardRule
    def product(x, y, n):
        return x * y, n

    @product.def_jvp
    def _(primals, tangents):
        seen.append([t is None for t in tangents])
        return product(*primals), (tangents[0] * primals[1], None)

    fn = lambda x: product(x, jnp.asarray(5.0), jnp.asarray(2))[0]
    assert jax.grad(fn)(X) == 5.0
    assert seen == [[False, True, True]]


ADJOINT = nks.KrylovAdjoint(rtol=1e-12)


def _loss(a, *, scan):
    """Two steps of an implicit recurrence."""
    solver = nks.NewtonKrylov(rtol=1e-10, atol=1e-13)

    def step(y, _):
        fn = lambda z, p: z - p[0] + 0.3 * p[1] * z**3
        return nks.root_find(
            fn, solver, jax.lax.stop_gradient(y), (y, a), adjoint=ADJOINT
        ).value, None

    y = jnp.array([1.0, 0.5]) * (1 + a)
    if scan:
        y, _ = jax.lax.scan(step, y, None, length=2)
    else:
        for _ in range(2):
            y, _ = step(y, None)
    return jnp.sum(y**2)


@pytest.mark.parametrize("second", [jax.jacfwd, jax.jacrev])
def test_the_derivative_of_a_gradient_through_a_scan(second):
    """JAX inlines what a `custom_jvp` wraps there, and the rule is lost."""
    a = jnp.asarray(0.7)
    plain = jax.jit(jax.jacfwd(jax.jacfwd(ft.partial(_loss, scan=False))))(a)
    scanned = jax.jit(second(jax.grad(ft.partial(_loss, scan=True))))(a)
    np.testing.assert_allclose(scanned, plain, rtol=1e-8)
    step = 1e-4
    loss = jax.jit(jax.grad(ft.partial(_loss, scan=True)))
    np.testing.assert_allclose(scanned, (loss(a + step) - loss(a - step)) / (2 * step), rtol=1e-6)
